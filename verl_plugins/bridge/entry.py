"""verl loads this in every process that imports it (entry-point group `verl.plugins`).

It does nothing unless a run of ours asks for it through the environment, and then makes our rollout server and, on
request, the CPU platform known to verl. verl is only half imported at this point and swallows our exceptions at DEBUG
level, so a failure is printed before it is raised again. Nothing else imports this module.
"""

import os
import sys
import traceback

from verl_plugins.bridge import RUN_VARIABLE


def _install() -> None:
    if os.environ.get("VERL_PLATFORM") == "cpu":
        from verl_plugins.cpu import platform, vllm

        platform.install()
        vllm.answer_version()
    from verl_plugins.cpu import registration

    registration.register_rollout()


if os.environ.get(RUN_VARIABLE) == "1":
    try:
        _install()
    except Exception:
        traceback.print_exc(file=sys.stderr)
        raise
