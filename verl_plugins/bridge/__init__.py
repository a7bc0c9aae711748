"""The only code, with `cpu/`, that imports verl, ray and transfer_queue."""

RUN_VARIABLE = "VERL_PLUGINS_RUN"
"""Environment variable, 1 in every process of a run of ours; without it our entry point does nothing."""
