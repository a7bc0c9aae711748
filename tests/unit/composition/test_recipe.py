"""Recipes, presets and the command line become one configuration, or one sentence on what does not fit."""

from __future__ import annotations

import itertools
import sys
import textwrap

import pytest
from omegaconf import OmegaConf

from verl_plugins import CompositionError
from verl_plugins.composition import compose, manifest, needs, recipe

RECIPES = ("grpo", "mc_grpo", "vade", "clip_cov")
PRESETS = ("cpu", "1gpu", "8gpu")
ABOUT = "recipe: {title: A, summary: B}\n"
LAB = "recipe: {title: A, kind: lab, lab: 'm:f'}\n"
PRESET = "preset: {title: A, summary: B, prepare: 'acme:make'}\nactor_rollout_ref: {rollout: {name: vllm, n: 4}}\n"


def composed(recipes: str = "grpo", *overrides: str, preset: str | None = None) -> compose.Composed:
    return compose.compose(recipes, preset, overrides)


def refused(sentence, parts: list[str], *args: str, preset: str | None = None, check: bool = False) -> None:
    with pytest.raises(CompositionError) as error:
        run = composed(*args, preset=preset)
        if check:
            needs.check(run)
    sentence(error.value, *parts)


class TestShipped:
    """What the package brings composes, alone and together, without importing verl."""

    @pytest.mark.parametrize("name", RECIPES)
    def test_recipes_are_described(self, name: str) -> None:
        found = {item.name: item for item in recipe.recipes(manifest.folders(manifest.entries()))}[name]
        assert found.broken == ""
        assert found.title and found.arxiv and found.summary and found.results and found.status and found.authors
        assert found.summary.endswith(".") and found.summary.count(". ") == 0
        assert found.distribution == "verl-plugins"

    @pytest.mark.parametrize(("name", "preset"), itertools.product(RECIPES, PRESETS))
    def test_every_recipe_fits_every_preset(self, name: str, preset: str, tmp_path) -> None:
        data = tmp_path / "data.parquet"
        data.touch()
        files = [] if preset == "cpu" else [f"data.{key}={data}" for key in ("train_files", "val_files")]
        run = composed(name, *files, preset=preset)
        plugins = needs.check(run)
        assert [item.name for item in plugins] == list(run.plugins)
        assert run.config.algorithm.adv_estimator == "grpo"
        assert "plugins" not in run.defaults

    @pytest.mark.parametrize("pair", ["vade+clip_cov", "mc_grpo+vade", "vade+grpo", "mc_grpo+clip_cov"])
    def test_recipes_combine(self, pair: str) -> None:
        run = composed(pair, preset="cpu")
        plugins = needs.check(run)
        assert set(pair.split("+")) <= {item.name for item in plugins}
        assert run.recipe == pair

    def test_stages_in_metadata_are_the_plugin_s(self) -> None:
        installed = manifest.entries()
        for item in recipe.recipes(manifest.folders(installed)):
            if item.distribution == "verl-plugins":
                named = item.plugins if item.kind == "training" else ()
                hooks = [hook for name in named for hook in manifest.find(name, installed).hooks]
                assert set(item.stages) <= {hook.stage for hook in hooks}

    def test_verl_and_torch_are_not_imported_to_compose(self) -> None:
        import subprocess

        code = "import sys, verl_plugins.composition.compose as c; c.compose('vade', 'cpu'); print(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert not {"verl", "torch", "ray", "transformers"} & set(done.stdout.split())


class TestOrder:
    """verl defaults < preset < recipe < command line."""

    def test_the_later_wins(self, site) -> None:
        preset = PRESET + "trainer: {nnodes: 2, save_freq: 2, test_freq: 2}\nplugins: {math_verify: {cache_size: 5}}\n"
        file = ABOUT + "plugins: {grpo: {}, math_verify: {cache_size: 6}}\ntrainer: {save_freq: 3, test_freq: 3}\n"
        site.recipes("acme", mine=file, presets__ours=preset)
        run = composed("mine", "trainer.test_freq=4", "plugins.math_verify.max_characters=7", preset="ours")
        trainer = run.config.trainer
        assert (trainer.nnodes, trainer.save_freq, trainer.test_freq) == (2, 3, 4)
        chosen = run.plugins["math_verify"]
        assert (chosen["cache_size"], chosen["max_characters"]) == (6, 7)
        assert list(run.plugins) == ["math_verify", "grpo"]
        assert run.defaults.trainer.nnodes == 1

    def test_settings_are_expanded_with_defaults(self) -> None:
        run = composed("vade")
        assert run.plugins["vade"]["lambda_selected"] == 0.2
        assert len(run.plugins["vade"]) == len(manifest.find("vade", manifest.entries()).settings)

    def test_environment_prepare_and_own_section(self, site) -> None:
        text = """
            preset: {title: A, summary: B, env: {NAME: 3}, prepare: "acme.make:data"}
            cpu: {threads: 2}
        """
        site.recipes("acme", presets__ours=textwrap.dedent(text))
        run = composed("grpo", "cpu.threads=4", preset="ours")
        assert (run.env, run.prepare, run.config.cpu.threads) == ({"NAME": "3"}, "acme.make:data", 4)

    def test_groups_of_verl_are_chosen(self, site) -> None:
        assert composed("grpo", "model_engine=megatron").config.actor_rollout_ref.actor.strategy == "megatron"
        site.recipes("acme", presets__mega=PRESET + "model_engine: megatron\n")
        assert composed("grpo", preset="mega").config.actor_rollout_ref.actor.strategy == "megatron"

    def test_exponents_without_a_dot_are_numbers(self, site) -> None:
        site.recipes("acme", mine=ABOUT + "actor_rollout_ref: {actor: {optim: {lr: 1e-6}}}")
        assert composed("mine").config.actor_rollout_ref.actor.optim.lr == 1e-6

    def test_lists_replace_and_sections_merge(self) -> None:
        run = composed("grpo", "trainer.logger=[file]", "data={seed: 3}")
        assert run.config.trainer.logger == ["file"]
        assert (run.config.data.seed, run.config.data.shuffle) == (3, True)


class TestCommandLine:
    """Hydra's grammar, with hints."""

    def test_plugins_are_switched_on_and_off(self) -> None:
        run = composed("grpo", "+plugins.clip_cov={}", "+plugins.vade.lambda_selected=0.3", "~plugins.grpo")
        assert list(run.plugins) == ["clip_cov", "vade"]
        assert run.plugins["vade"]["lambda_selected"] == 0.3
        assert "lambda_unselected" in run.plugins["vade"]

    def test_adding_and_removing_keys(self) -> None:
        key = "actor_rollout_ref.model.override_config"
        run = composed("grpo", f"+{key}.attn=sdpa", "++trainer.nnodes=3", "++trainer.own=1", "~trainer.v1.sampler")
        assert OmegaConf.select(run.config, key) == {"attn": "sdpa"}
        assert (run.config.trainer.nnodes, run.config.trainer.own) == (3, 1)
        assert "sampler" not in run.config.trainer.v1

    @pytest.mark.parametrize(
        ("override", "parts"),
        [
            ("actor.optim.lr=1", ["'actor.optim.lr'", "'actor_rollout_ref.actor.optim.lr=1'"]),
            ("trainer.nnodez=2", ["'trainer.nnodez'", "did you mean 'trainer.nnodes=2'?"]),
            ("quite_unlike_anything=2", ["'quite_unlike_anything'", "'+quite_unlike_anything=2'"]),
            ("~trainer.nnodez", ["'~trainer.nnodez'", "no key"]),
            ("+trainer.nnodes=2", ["'trainer.nnodes' exists already", "'trainer.nnodes=2'"]),
            ("actor_rollout_ref.model.override_config.a=1", ["'+actor_rollout_ref.model.override_config.a=1'"]),
            ("trainer=3", ["'trainer' is a section", "3"]),
            ("+trainer.nnodes.x=1", ["'trainer.nnodes' is not a section", "1"]),
            ("data={sed: 3}", ["'data={sed: 3}'", "sed"]),
            ("trainer.nnodes=1,2", ["'trainer.nnodes=1,2'", "several values"]),
            ("no equals sign", ["'no equals sign'", "key=value"]),
            ("model_engine=megatrom", ["model_engine=megatrom", "does not fit"]),
            ("plugins.clip_cov.scope=batch", ["'clip_cov' is not switched on", "'+plugins.clip_cov={}'", "+clip_cov"]),
            ("plugins.clip_kov.scope=batch", ["'clip_kov' is not installed", "did you mean 'clip_cov'?"]),
            ("+plugins.clip_kov={}", ["command line", "'clip_kov' is not installed", "did you mean 'clip_cov'?"]),
            ("plugins.grpo.epsilom=1", ["'epsilom' is not a setting of grpo", "did you mean 'epsilon'?"]),
            ("+plugins.grpo.epsilom=1", ["plugins.grpo.epsilom", "did you mean 'epsilon'?"]),
        ],
    )
    def test_what_does_not_fit(self, sentence, override: str, parts: list[str]) -> None:
        refused(sentence, parts, "grpo", override)


class TestFiles:
    """Mistakes in a recipe or preset name the file and the key."""

    @pytest.mark.parametrize(
        ("text", "parts"),
        [
            ("trainer: {nnodes: 1}", ["'recipe' is missing"]),
            ("[1, 2]", ["must be a mapping"]),
            ("recipe: {titel: A}", ["recipe.titel", "did you mean 'title'?"]),
            ("recipe: {stages: [observ]}", ["'observ'", "did you mean 'observe'?"]),
            ("recipe: {title: A}\nrecipe: {title: B}", ["'recipe' is given twice"]),
            ("recipe: {title: A", ["cannot be read"]),
            (ABOUT + "trainer: &a {x: *a}", ["an alias stands inside what it names"]),
            (ABOUT + "plugins: {grpo: &a {epsilon: [*a]}}", ["an alias stands inside what it names"]),
            (ABOUT + "trainer: {nnodez: 1}", ["'trainer.nnodez'", "did you mean 'trainer.nnodes'", "'+nnodez'"]),
            (ABOUT + "trainer: 3", ["'trainer' is a section"]),
            (ABOUT + "plugins: [grpo]", ["plugins must be a mapping"]),
            (ABOUT + "plugins: {grpo: 3}", ["plugins.grpo is 3"]),
            (ABOUT + "plugins: {grop: {}}", ["'grop' is not installed", "did you mean 'grpo'?"]),
            (ABOUT + "plugins: {grpo: {epsilom: 1}}", ["plugins.grpo.epsilom", "did you mean 'epsilon'?"]),
            (ABOUT + "cpu: {threads: 2}", ["'cpu'"]),
            ("recipe: {lab: run me}", ["recipe.lab is 'run me'", "module:function"]),
            ("recipe: {lab: 5}", ["recipe.lab is 5", "module:function"]),
            ("recipe: {kind: labb}", ["recipe.kind is 'labb'", "training or lab"]),
            ("recipe: {kind: lab}", ["recipe.lab must name its function"]),
            (LAB + "plugins: {grpo: {}}", ["trains nothing", "remove 'plugins'"]),
            (LAB + "trainer: {nnodes: 2}", ["trains nothing", "remove 'trainer'"]),
            ("recipe: {kind: lab, lab: 'm:f', stages: [observe]}", ["trains nothing", "remove 'recipe.stages'"]),
            (LAB, ["'mine' is a lab", "verl-plugins lab mine"]),
        ],
    )
    def test_recipe(self, site, sentence, text: str, parts: list[str]) -> None:
        folder = site.recipes("acme", mine=text)
        where = [] if text == LAB else [str(folder / "mine.yaml")]
        refused(sentence, [*where, *parts], "mine")

    @pytest.mark.parametrize(
        ("text", "parts"),
        [
            ("preset: {titel: A}", ["preset.titel", "did you mean 'title'?"]),
            ("preset: {env: [A]}", ["preset.env must be a mapping"]),
            ("preset: {env: {A: true}}", ["preset.env.A is True"]),
            ("preset: {prepare: run me}", ["preset.prepare is 'run me'", "module:function"]),
            ("preset: {sketch: 5}", ["preset.sketch is 5", "module:function"]),
        ],
    )
    def test_preset(self, site, sentence, text: str, parts: list[str]) -> None:
        folder = site.recipes("acme", presets__ours=text)
        refused(sentence, [str(folder / "presets" / "ours.yaml"), *parts], "grpo", preset="ours")

    @pytest.mark.parametrize(
        "tagged",
        [
            "!!python/object/apply:os.mkdir [made]",
            "!!python/object/new:os.mkdir [made]",
            "!!python/name:os.system",
            "!!python/module:os",
            "!!python/tuple [1, 2]",
            "!own 3",
        ],
    )
    def test_tags_make_nothing(self, site, sentence, monkeypatch, tmp_path, tagged: str) -> None:
        monkeypatch.chdir(tmp_path)
        text = f"trainer:\n  total_epochs: {tagged}\n"
        folder = site.recipes("acme", mine=ABOUT + text, presets__ours=PRESET + text)
        refused(sentence, [str(folder / "mine.yaml"), "could not determine a constructor"], "mine")
        refused(sentence, [str(folder / "presets" / "ours.yaml"), "could not determine"], "grpo", preset="ours")
        assert not (tmp_path / "made").exists()

    def test_keys_may_be_added_in_free_sections_and_with_a_plus(self, site) -> None:
        text = """
            recipe: {title: A}
            actor_rollout_ref: {model: {override_config: {a: 1, b: {c: 2}}}}
            ray_kwargs: {ray_init: {num_gpus: 1}}
            trainer: {+own: {deep: 1}}
        """
        site.recipes("acme", mine=textwrap.dedent(text))
        config = composed("mine").config
        assert config.actor_rollout_ref.model.override_config == {"a": 1, "b": {"c": 2}}
        assert (config.ray_kwargs.ray_init.num_gpus, config.trainer.own.deep) == (1, 1)

    def test_a_broken_recipe_does_not_hide_the_others(self, site) -> None:
        site.recipes("acme", bad="recipe: {titel: A}", good=ABOUT)
        found = {item.name: item for item in recipe.recipes(manifest.folders(manifest.entries()))}
        assert "titel" in found["bad"].broken
        assert found["good"].broken == found["grpo"].broken == ""

    def test_the_same_recipe_from_two_distributions(self, site, sentence) -> None:
        site.recipes("one", mine=ABOUT)
        site.recipes("two", mine=ABOUT)
        refused(sentence, ["'mine'", "one (", "two (", "uninstall one"], "mine")

    def test_unknown_names_give_the_nearest(self, sentence) -> None:
        refused(sentence, ["no recipe 'vad'", "did you mean 'vade'?"], "vad")
        refused(sentence, ["no preset '1gpus'", "did you mean '1gpu'?"], "grpo", preset="1gpus")


class TestCombination:
    """Plugins are united in order; equal keys agree or the error shows both."""

    def test_plugins_are_united_in_the_order_given(self, site) -> None:
        one, two = "plugins: {vade: {}, grpo: {}}", "plugins: {clip_cov: {}, grpo: {}}"
        site.recipes("acme", one=ABOUT + one, two=ABOUT + two)
        assert list(composed("one+two").plugins) == ["vade", "grpo", "clip_cov"]

    def test_settings_of_one_plugin_are_united(self, site) -> None:
        one, two = "plugins: {vade: {lambda_selected: 0.1}}", "plugins: {vade: {lambda_unselected: 0.9}}"
        site.recipes("acme", one=ABOUT + one, two=ABOUT + two)
        settings = composed("one+two").plugins["vade"]
        assert (settings["lambda_selected"], settings["lambda_unselected"]) == (0.1, 0.9)

    @pytest.mark.parametrize(
        ("one", "two", "parts"),
        [
            ("trainer: {nnodes: 2}", "trainer: {nnodes: 3}", ["trainer.nnodes", "2 and 3"]),
            ("plugins: {grpo: {epsilon: 0.1}}", "plugins: {grpo: {epsilon: 0.2}}", ["plugins.grpo.epsilon", "0.1 and"]),
        ],
    )
    def test_disagreement(self, site, sentence, one: str, two: str, parts: list[str]) -> None:
        site.recipes("acme", one=ABOUT + one, two=ABOUT + two)
        refused(sentence, ["one and two disagree", *parts], "one+two")

    def test_the_command_line_decides(self, site, sentence) -> None:
        one = "plugins: {grpo: {epsilon: 0.1}}\nactor_rollout_ref: {actor: {use_kl_loss: true, entropy_coeff: 0.1}}"
        two = "plugins: {grpo: {epsilon: 0.2}}\nactor_rollout_ref: {actor: {use_kl_loss: false, entropy_coeff: 0.1}}"
        site.recipes("acme", one=ABOUT + one, two=ABOUT + two)
        decided = ["plugins.grpo.epsilon=0.3", "actor_rollout_ref.actor.use_kl_loss=true"]
        refused(sentence, ["true and false", f"as in {decided[1]}"], "one+two", decided[0])
        run = composed("one+two", *decided)
        assert run.plugins["grpo"]["epsilon"] == 0.3
        assert run.config.actor_rollout_ref.actor.use_kl_loss is True


class TestCheck:
    """What plugins need is switched on in verl, or refused with the reason."""

    @pytest.fixture(autouse=True)
    def ours(self, site) -> None:
        site.recipes("acme-files", presets__ours=PRESET)

    def provide(self, site, need: str, *overrides: str):
        site.plugin("needy", f"needs = frozenset({{'{need}'}})")
        run = composed("grpo", "+plugins.needy={}", *overrides, preset="ours")
        needs.check(run)
        return run.config

    def test_reference_policy(self, site) -> None:
        actor = self.provide(site, "ref_log_probs").actor_rollout_ref.actor
        assert (actor.use_kl_loss, actor.kl_loss_coef) == (True, 0.0)

    def test_reference_policy_that_is_there_already(self, site) -> None:
        config = self.provide(site, "ref_log_probs", "algorithm.use_kl_in_reward=True")
        assert config.actor_rollout_ref.actor.use_kl_loss is False

    def test_current_entropy(self, site) -> None:
        assert self.provide(site, "current_entropy").actor_rollout_ref.actor.calculate_entropy is True

    def test_rollout_log_probs(self, site) -> None:
        config = self.provide(site, "rollout_log_probs", "actor_rollout_ref.rollout.calculate_log_probs=False")
        assert config.actor_rollout_ref.rollout.calculate_log_probs is True

    @pytest.mark.parametrize("need", ["entropy", "old_log_probs", "prompt_log_probs"])
    def test_bypass_mode_leaves_fields_out(self, site, sentence, need: str) -> None:
        with pytest.raises(CompositionError) as error:
            self.provide(site, need, "algorithm.rollout_correction.bypass_mode=True")
        sentence(error.value, "'needy'", need, "algorithm.rollout_correction.bypass_mode=True")

    def test_unknown_need(self, site, sentence) -> None:
        with pytest.raises(CompositionError) as error:
            self.provide(site, "entropi")
        sentence(error.value, "'needy'", "'entropi'", "did you mean 'entropy'?")

    def test_a_plugin_s_own_check(self, site, sentence) -> None:
        site.plugin("picky", "def check(self, config):\n    raise ValueError(config.trainer.nnodes)")
        refused(sentence, ["'picky'", "ValueError: 1"], "grpo", "+plugins.picky={}", preset="ours", check=True)

    @pytest.mark.parametrize(
        ("override", "parts"),
        [
            ("trainer.v1.trainer_mode=synk", ["trainer.v1.trainer_mode", "'synk'", "did you mean 'sync'?"]),
            ("ray_kwargs.timeline_json_file=t.json", ["ray_kwargs.timeline_json_file=t.json", "null"]),
            ("trainer.use_v1=False", ["trainer.use_v1", "True"]),
            (
                "+actor_rollout_ref.rollout.agent.agent_loop_manager_class=a.B",
                ["actor_rollout_ref.rollout.agent.agent_loop_manager_class", "'a.B'"],
            ),
            ("actor_rollout_ref.rollout.name=???", ["actor_rollout_ref.rollout.name has no value"]),
            ("plugins.grpo.epsilon=-1", ["plugins.grpo.epsilon is -1"]),
            ("plugins.grpo.epsilon=${nothing}", ["cannot be resolved", "nothing"]),
        ],
    )
    def test_settings_that_cannot_work(self, sentence, override: str, parts: list[str]) -> None:
        refused(sentence, parts, "grpo", override, preset="ours", check=True)

    def test_determinism_needs_rollouts_that_are_not_interrupted(self, sentence) -> None:
        asked = ("trainer.v1.trainer_mode=colocate_async", "actor_rollout_ref.rollout.full_determinism=True")
        parts = ["full_determinism=True", "colocate_async", "trainer.v1.trainer_mode=sync"]
        refused(sentence, parts, "grpo", *asked, preset="ours", check=True)

    def test_a_single_kept_checkpoint(self, sentence) -> None:
        asked = ("trainer.max_actor_ckpt_to_keep=1", "trainer.save_freq=5")
        refused(sentence, ["trainer.max_actor_ckpt_to_keep=1", "=2"], "grpo", *asked, preset="ours", check=True)

    def test_interpolated_settings_are_resolved(self) -> None:
        run = composed("grpo", "+plugins.math_verify.cache_size=${data.train_batch_size}", preset="ours")
        needs.check(run)
        assert OmegaConf.to_container(run.config.plugins)["math_verify"]["cache_size"] == 1024

    def test_a_plugin_and_a_loss_of_verl(self, sentence) -> None:
        mode = "actor_rollout_ref.actor.policy_loss.loss_mode"
        refused(sentence, [mode, "'gspo'", "'clip_cov'"], "clip_cov", f"{mode}=gspo", preset="ours", check=True)

    def test_what_the_preset_leaves_to_the_user(self, sentence) -> None:
        refused(sentence, ["data.train_files has no value", "data.train_files=…"], "grpo", preset="1gpu", check=True)
