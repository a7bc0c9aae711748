"""Numbers of ranks, rows and servers that must go into each other: verl asserts it in its workers, a minute later."""

from __future__ import annotations

from collections.abc import Collection
from math import gcd, lcm, prod

from omegaconf import DictConfig, OmegaConf

from verl_plugins.composition import separate, teacher
from verl_plugins.composition.refusals import FSDP, has_critic
from verl_plugins.errors import CompositionError

ROLES = {
    "actor": ("actor_rollout_ref.actor", "fsdp_config"),
    "ref": ("actor_rollout_ref.ref", "fsdp_config"),
    "critic": ("critic", "fsdp"),
}
"""Where the settings of a model's engine are: its section, and FSDP's own in it."""
ULYSSES = "ulysses_sequence_parallel_size"
MEGATRON = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
SERVER = ("tensor_model_parallel_size", "data_parallel_size", "pipeline_model_parallel_size")
OF_A_NODE = ("num_cpus", "num_gpus", "include_dashboard")
ROLLOUT = "actor_rollout_ref.rollout"
DYNAMIC = "actor_rollout_ref.actor.use_dynamic_bsz"


def check(config: DictConfig, given: Collection[str]) -> None:
    """Refuse sizes that do not fit, with ones that do; `given` are the keys that preset, recipe or command line set.

    Raises:
        CompositionError: names the key and a value that fits.
    """
    _check_ray(config)
    _check_servers(config)
    reference = config.actor_rollout_ref.actor.use_kl_loss or config.algorithm.use_kl_in_reward
    trained = ["actor", "critic"] if has_critic(config) else ["actor"]
    scoring = [ROLLOUT, "actor_rollout_ref.ref"] if reference else [ROLLOUT]
    _check_dynamic(config)
    if DYNAMIC in given:
        _check_fixed_sizes(config, trained, scoring)
    for role in [*trained, "ref"] if reference else trained:
        _check_sequence_parallel(config, role)
    for role in trained:
        _check_update(config, role)
    _check_passes(config, trained, scoring)


def _sequence_parallel(config: DictConfig, role: str) -> tuple[str, int]:
    """Key and number of the ranks over which FSDP spreads a sequence; verl reads both keys."""
    section, fsdp = ROLES[role]
    keys = [f"{section}.{ULYSSES}", f"{section}.{fsdp}.{ULYSSES}"]
    found = {key: int(OmegaConf.select(config, key) or 1) for key in keys}
    return next(((key, size) for key, size in found.items() if size > 1), (keys[0], 1))


def _ranks(config: DictConfig) -> int:
    return int(config.trainer.n_gpus_per_node) * int(config.trainer.nnodes)


def _strategy(config: DictConfig, role: str) -> str:
    return str(OmegaConf.select(config, f"{ROLES[role][0]}.strategy"))


def _ranks_with_rows(config: DictConfig, role: str) -> int | None:
    """Ranks over which the rows are split; None for engines that are not known here."""
    strategy = _strategy(config, role)
    if strategy in FSDP:
        key, size = _sequence_parallel(config, role)
    elif strategy == "megatron":
        key = f"{ROLES[role][0]}.megatron"
        size = prod(int(OmegaConf.select(config, f"{key}.{name}") or 1) for name in MEGATRON)
    else:
        return None
    ranks = _ranks(config)
    if ranks % size:
        raise CompositionError(
            f"{key}: {ranks} ranks (trainer.n_gpus_per_node times trainer.nnodes) are no multiple of the {size} that "
            f"share a row: set trainer.n_gpus_per_node={size * max(1, ranks // size)}"
        )
    return ranks // size


def _check_ray(config: DictConfig) -> None:
    """A run on one machine's CPU starts Ray itself, with as many logical GPUs as it is told; a cluster has its own."""
    options = config.ray_kwargs.ray_init
    if options.get("address") and (set_here := [key for key in OF_A_NODE if options.get(key) is not None]):
        mended = " ".join(f"ray_kwargs.ray_init.{key}=null" for key in set_here)
        raise CompositionError(
            f"ray_kwargs.ray_init.{set_here[0]}={options[set_here[0]]} is for a Ray node that the run starts itself, "
            f"and ray_kwargs.ray_init.address names a cluster that is there: set {mended}"
        )
    beside = separate.servers(config) + teacher.devices(config)
    there, asked = options.get("num_gpus"), int(config.trainer.n_gpus_per_node) + beside
    if config.trainer.device == "cpu" and config.trainer.nnodes == 1 and there is not None and there < asked:
        raise CompositionError(
            f"ray_kwargs.ray_init.num_gpus is {there}, and the run has {asked} ranks and servers beside them, one of "
            f"Ray's for each: set ray_kwargs.ray_init.num_gpus={asked}"
        )


def _check_servers(config: DictConfig) -> None:
    rollout = OmegaConf.select(config, ROLLOUT)
    size = prod(int(rollout.get(name) or 1) for name in SERVER)
    ranks = separate.servers(config) or _ranks(config)
    if ranks % size and not OmegaConf.select(rollout, "disaggregation.enabled"):
        key = f"{ROLLOUT}.{SERVER[0]}"
        raise CompositionError(
            f"{key}={rollout.tensor_model_parallel_size}: a rollout server has {size} ranks (tensor, data and pipeline "
            f"parallel), into which {ranks} ({_whose(config)}) do not go: set "
            f"{key}={gcd(ranks, int(rollout.tensor_model_parallel_size))}"
        )


def _whose(config: DictConfig) -> str:
    section = ROLLOUT if separate.is_chosen(config) else "trainer"
    return f"{section}.n_gpus_per_node times {section}.nnodes"


def _check_dynamic(config: DictConfig) -> None:
    """The actor's two kinds of passes are cut alike."""
    dynamic, key = bool(OmegaConf.select(config, DYNAMIC)), f"{ROLLOUT}.log_prob_use_dynamic_bsz"
    if bool(OmegaConf.select(config, key)) != dynamic:
        raise CompositionError(f"{key} differs from {DYNAMIC}={dynamic}: set {key}={dynamic}")


def _check_fixed_sizes(config: DictConfig, trained: list[str], scoring: list[str]) -> None:
    """Where micro-batches have a fixed size, it is given."""
    name = "micro_batch_size_per_gpu"
    sizes = {f"{ROLES[role][0]}.use_dynamic_bsz": f"{ROLES[role][0]}.ppo_{name}" for role in trained}
    sizes |= {f"{section}.log_prob_use_dynamic_bsz": f"{section}.log_prob_{name}" for section in scoring}
    missing = {
        switch: f"{size}=…"
        for switch, size in sizes.items()
        if not OmegaConf.select(config, switch) and OmegaConf.select(config, size) is None
    }
    if missing:
        raise CompositionError(
            f"{next(iter(missing))} is False and there is no size for micro-batches: set "
            f"{' and '.join(missing.values())}, or {DYNAMIC}=True"
        )


def _check_sequence_parallel(config: DictConfig, role: str) -> None:
    """verl spreads a sequence over ranks inside of flash attention, and only where sequences are packed."""
    key, size = _sequence_parallel(config, role)
    if size == 1 or _strategy(config, role) not in FSDP:
        return
    model = "critic.model" if role == "critic" else "actor_rollout_ref.model"
    if not OmegaConf.select(config, f"{model}.use_remove_padding"):
        raise CompositionError(
            f"{key}={size} spreads packed sequences over ranks: set {model}.use_remove_padding=True, or {key}=1"
        )
    attention = OmegaConf.select(config, f"{model}.override_config.attn_implementation") or "flash_attention_2"
    if not str(attention).startswith("flash_attention"):
        raise CompositionError(
            f"{key}={size} spreads sequences over ranks inside of flash attention, and {model}.override_config."
            f"attn_implementation is {attention!r}, where each rank would see its part alone: set {key}=1, or choose "
            "flash_attention_2"
        )


def _rows_of_update(config: DictConfig, role: str) -> int:
    size = OmegaConf.select(config, f"{ROLES[role][0]}.ppo_mini_batch_size")
    return int(size) * int(OmegaConf.select(config, f"{ROLLOUT}.n"))


def _check_update(config: DictConfig, role: str) -> None:
    """The rows of a mini-batch go into ranks, and those of a rank into micro-batches."""
    ranks = _ranks_with_rows(config, role)
    if ranks is None:
        return
    section, n = ROLES[role][0], int(OmegaConf.select(config, f"{ROLLOUT}.n"))
    key, size = f"{section}.ppo_mini_batch_size", int(OmegaConf.select(config, f"{section}.ppo_mini_batch_size"))
    rows = _rows_of_update(config, role)
    if rows % ranks:
        unit = ranks // gcd(ranks, n)
        raise CompositionError(
            f"{key}={size} times {ROLLOUT}.n={n} are {rows} rows an update, which {ranks} ranks cannot share evenly: "
            f"set {key}={max(unit, size // unit * unit)}"
        )
    if not OmegaConf.select(config, f"{section}.use_dynamic_bsz"):
        _check_fixed(f"{section}.ppo_micro_batch_size_per_gpu", config, rows // ranks, "an update")


def _check_fixed(key: str, config: DictConfig, rows: int, what: str) -> None:
    size = OmegaConf.select(config, key)
    if size is not None and rows % int(size):
        raise CompositionError(
            f"{key}={size}: the {rows} rows of a rank in {what} do not go into micro-batches of {size}: set "
            f"{key}={gcd(rows, int(size))}"
        )


def _check_passes(config: DictConfig, trained: list[str], scoring: list[str]) -> None:
    """verl fills the batch up to whole mini-batches; then a rank's share goes through forward passes."""
    ranks = _ranks_with_rows(config, "actor")
    if ranks is None:
        return
    unit = lcm(ranks, *[_rows_of_update(config, role) for role in trained])
    rows = int(config.data.train_batch_size) * int(OmegaConf.select(config, f"{ROLLOUT}.n"))
    share = -(-rows // unit) * unit // ranks
    for section in scoring:
        if not OmegaConf.select(config, f"{section}.log_prob_use_dynamic_bsz"):
            _check_fixed(f"{section}.log_prob_micro_batch_size_per_gpu", config, share, "a forward pass")
