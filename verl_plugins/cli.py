"""`python -m verl_plugins.cli`, as packages written by `verl-plugins new` call the command in their tests."""

from verl_plugins.commands.cli import app, main

__all__ = ["app", "main"]

if __name__ == "__main__":
    main()
