"""`python -m verl_plugins`: the command without its console script."""

from verl_plugins.commands.cli import main

if __name__ == "__main__":
    main()
