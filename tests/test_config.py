from dataclasses import dataclass, replace
from typing import ClassVar

import huggingface_hub.constants
import pytest

from perennial import config as module
from perennial import discovery, overrides
from perennial.config import Config, Tasks, preset, validate, validate_settings
from perennial.errors import PerennialError
from perennial.learning.grpo import GRPO
from perennial.policies._anatomy import Anatomy
from perennial.policies.base import Policy
from perennial.strategies.dark_replay import DarkReplay
from perennial.strategies.ema import EMA
from perennial.strategies.ewc import EWC
from perennial.strategies.kl_anchor import KLAnchor
from perennial.strategies.l2 import L2
from perennial.strategies.replay import Replay
from perennial.strategies.slca import SLCA
from perennial.testing.toy import ToyPolicy
from toyhouse.needy import Needy


def test_a_sound_configuration_comes_back_as_it_is(config):
    assert validate(config) is config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suite": "metaword"}, r"no suite 'metaword'\. Did you mean metaworld"),
        ({"policy.name": "openvla_ofd"}, r"no policy 'openvla_ofd'\. Did you mean openvla_oft"),
        ({"policy.checkpoint": "nowhere"}, r"'nowhere' does not exist; give a folder"),
        ({"tasks.trained": "lefft"}, r"no task .*'lefft'\. Did you mean left"),
        ({"tasks.held_out": "downright"}, r"no task .*'downright'\. Did you mean down-right"),
        ({"tasks.trained": ""}, r"no task to train; set --tasks\.trained"),
        ({"tasks.trained": "left,left"}, r"'left' is listed twice"),
        ({"tasks.held_out": "left"}, r"'left' is listed twice"),
        ({"evaluation.variants": "id,od_test"}, r"no variant .*'od_test'\. Did you mean ood_test"),
        ({"evaluation.variants": "id,id"}, r"--evaluation\.variants is 'id,id', but it needs names, each of them once"),
        ({"evaluation.decoders": ""}, r"--evaluation\.decoders is '', but it needs names"),
        ({"recipe": "none"}, r"recipe has no stage"),
        ({"schedule": "joint", "strategies": "l2,merge"}, r"'merge' cannot guard tasks .* it would merge again for"),
        ({"schedule": "joint", "strategies": "retain"}, r"'retain' cannot guard tasks that are learned all at once"),
        ({"schedule": "joint", "strategies": "expansion"}, r"'expansion' cannot .*; leave it out, or set --schedule s"),
        (
            {"schedule": "joint", "strategies": "ewc"},
            r"'ewc' .*, of which there are none without ewc\.pretraining; leave",
        ),
        (
            {"schedule": "joint", "strategies": "replay"},
            r"'replay' cannot guard .* earlier tasks, of which there are non",
        ),
        (
            {"schedule": "joint", "strategies": "dark_replay", "strategies.dark_replay.variant": "ut2026"},
            r"'dark_replay' cannot guard .* replays earlier tasks",
        ),
        (
            {"strategies": "merge,ema"},
            r"^'ema' cannot guard .*, as it would replace what 'merge' makes of a task; list",
        ),
        (
            {"strategies": "ewc,expansion"},
            r"^'ewc' cannot .*'expansion' begins every task at the base, .* leave one of",
        ),
        ({"strategies": "ewc,l2,ewc"}, r"--strategies is 'ewc,l2,ewc', but each of them may be chosen once"),
        ({"policy.adapter.rank_by_group": "visoin=4"}, r"rank-by-group 'visoin'\. Did you mean vision"),
        ({"seed": "-1"}, r"--seed is -1, but it must be 0 or more"),
        ({"recipe.grpo.iterations": "-2"}, r"--recipe\.grpo\.iterations is -2, but it must be above 0"),
        ({"recipe.grpo.groups": "0"}, r"--recipe\.grpo\.groups is 0, but it must be above 0"),
        ({"recipe.grpo.group_size": "1"}, r"group_size is 1, but a group needs at least 2"),
        ({"recipe": "ppo", "recipe.ppo.gamma": "1.01"}, r"--recipe\.ppo\.gamma is 1\.01, but it must be at most 1"),
        ({"recipe": "ppo", "recipe.ppo.clip": "0"}, r"--recipe\.ppo\.clip is 0\.0, but it must be above 0"),
        ({"recipe.grpo.temperature": "0"}, r"temperature is 0\.0, but it must be above 0"),
        ({"recipe.grpo.optimizer.micro_batch": "0"}, r"--recipe\.grpo\.optimizer\.micro_batch is 0"),
        ({"recipe.grpo.optimizer.learning_rate": "-1e-3"}, r"learning_rate is -0\.001, but it must be above 0"),
        ({"evaluation.episodes": "0"}, r"--evaluation\.episodes is 0, but it must be above 0"),
        ({"evaluation.temperature": "0"}, r"--evaluation\.temperature is 0\.0"),
        ({"policy.adapter.rank": "0"}, r"--policy\.adapter\.rank is 0"),
        ({"policy.adapter.rank_by_group": "vision=0"}, r"rank_by_group is \{'vision': 0\}, but its numbers must be"),
        ({"recipe.grpo.optimizer.betas": "0.9,1"}, r"betas is \(0\.9, 1\.0\), but both must be at least 0 and below 1"),
        ({"strategies": "slca,ewc,slca"}, r"strategies slca and slca all set learning rates; keep one"),
        ({"strategies": "expansion,expansion"}, r"all choose the weights that act; keep one"),
        ({"recipe": "grpo,sft"}, r"no demonstration of left in 'demonstrations'; record some by `perennial demos"),
        (
            {"gate.max_forgetting": "-3"},
            r"--gate\.max_forgetting is -3\.0, but it must be above 0 and below 100 points",
        ),
        ({"gate.max_forgetting": "0"}, r"--gate\.max_forgetting is 0\.0, but it must be above 0"),
        ({"gate.max_task_forgetting": "100"}, r"--gate\.max_task_forgetting is 100\.0, but it must be .* below 100"),
        ({"gate.scales": "0.5,1"}, r"--gate\.scales is 0\.5,1\.0, but they must be above 0 and below 1"),
        ({"gate.scales": "0"}, r"--gate\.scales is 0\.0, but they must be above 0"),
        ({"gate.scales": "0.5,0.5"}, r"--gate\.scales is 0\.5,0\.5, but .* each once"),
        ({"gate.alpha": "0.7"}, r"--gate\.alpha is 0\.7, but it must be above 0 and at most 0\.5"),
        ({"gate.beta": "0"}, r"--gate\.beta is 0\.0, but it must be above 0"),
        ({"gate.pairs": "0"}, r"--gate\.pairs is 0, but it must be above 0"),
        ({"gate.held_out": "-1"}, r"--gate\.held_out is -1, but it must be 0 or more"),
        (
            {"gate.max_forgetting": "3", "strategies": "expansion"},
            r"'expansion' makes, as it gives tasks weights of",
        ),
        (
            {"gate.max_forgetting": "3", "strategies": "retain", "strategies.retain.chain": "parallel"},
            r"'retain' makes, as in a parallel chain it merges all .* again .*; leave out --gate\.max_forgetting or 'r",
        ),
        (
            {"gate.max_forgetting": "3", "strategies": "ewc", "strategies.ewc.variant": "ut2026"},
            r"'ewc' makes, as with ut2026 its Fisher is that of the training",
        ),
        (
            {"strategies": "ewc", "strategies.ewc.pretraining": "nowhere"},
            r"no demonstration in 'nowhere'.*ewc\.pre",
        ),
        ({"gate.max_forgetting": "3", "schedule": "joint", "gate.held_out": "0"}, r"gate has nothing to guard"),
        ({"workers.count": "-1"}, r"--workers\.count is -1, but it must be 0 or more"),
        ({"workers.timeout": "0"}, r"--workers\.timeout is 0\.0, but it must be above 0"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(config, changes, message):
    with pytest.raises(PerennialError, match=message):
        validate(overrides.apply(config, changes))


KITCHEN = {"suite": "kitchen", "tasks.trained": "kettle", "tasks.held_out": "microwave"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"suite": "libero"},
            r"^The task 'faucet-open-v3' belongs to the suite 'metaworld', not to 'libero'; beside --suite, give "
            r"--tasks\.trained and --tasks\.held_out with tasks that `perennial list suites libero` names\.$",
        ),
        ({"suite": "libero", "tasks.trained": "object-0"}, r"^The task '[\w-]+-v3' belongs to the suite 'metaworld'"),
        (
            {"suite": "libero", "tasks.trained": "object-11", "tasks.held_out": "object-1"},
            r"'object-11'\. Did you mean",
        ),
        ({"suite": "libero", "tasks.trained": "??", "tasks.held_out": "object-1"}, r"no task .*'\?\?'\. Known: 90-0"),
        (
            KITCHEN,
            r"^The checkpoint 'bundled:metaworld-small' works with 4 state numbers, but the suite 'kitchen' has 9;",
        ),
    ],
)
def test_a_preset_does_not_fit_every_suite(changes, message):
    with pytest.raises(PerennialError, match=message):
        validate(overrides.apply(preset("demo"), changes))


def test_actions_must_be_as_long_as_the_suites(config, monkeypatch):
    wider = Anatomy((), {}, 1, action_dim=7)  # and it reads no state
    monkeypatch.setattr(ToyPolicy, "anatomy", lambda folder, instruction: wider)
    with pytest.raises(PerennialError, match=r"works with 7 action numbers, but the suite '[\w.]+' has 2"):
        validate(config)


@pytest.mark.parametrize(
    "changes",
    [{"evaluation.variants": "id,cam2"}, {"strategies": "retain", "strategies.retain.alpha": "0.5,1"}],
    ids=["evaluated", "searched"],
)
def test_a_variant_that_only_some_tasks_have_is_refused_for_others(config, changes):
    suite = {"suite": "libero_study", "tasks.trained": "object-0", "tasks.held_out": "spatial-0"}
    chosen = overrides.apply(config, suite | changes | {"policy.name": "openvla_oft"})
    if "strategies" in changes:
        chosen = overrides.apply(chosen, {"strategies.retain.variant": "cam2"})
    with pytest.raises(PerennialError, match=r"^The variant 'cam2' is defined for .*, not for 'object-0'"):
        validate(chosen)
    validate(replace(chosen, tasks=Tasks(("spatial-1",), ("spatial-0",))))


def test_a_variant_in_which_a_task_is_not_played_need_not_be_one_of_its_own(config):
    """As in RETAIN's preset, where held-out tasks are evaluated in distribution only."""
    chosen = overrides.apply(
        config,
        {
            "suite": "libero_retain",
            "tasks.trained": "long-2",
            "tasks.held_out": "spatial-0",
            "evaluation.variants": "id,medium",
            "policy.name": "openvla_oft",
        },
    )
    validate(overrides.apply(chosen, {"evaluation.held_out": "first"}))
    with pytest.raises(PerennialError, match="not for 'spatial-0'"):
        validate(chosen)


def test_what_may_be_zero_is_accepted(config):
    zeros = ("workers.count", "evaluation.film", "recipe.grpo.clip_low", "recipe.grpo.optimizer.warmup_steps")
    changed = overrides.apply(config, dict.fromkeys(zeros, "0"))
    assert validate(changed).workers.count == 0


def test_an_objective_says_which_of_its_numbers_may_be_zero(config):
    @dataclass(frozen=True)
    class Anchored(GRPO):
        may_be_zero: ClassVar = GRPO.may_be_zero | {"kl_coefficient"}
        kl_coefficient: float = 0.0
        strength: float = 1.0

    assert validate(replace(config, recipe=(Anchored(),)))
    with pytest.raises(PerennialError, match=r"kl_coefficient is -1\.0, but it must be 0 or more"):
        validate(replace(config, recipe=(Anchored(kl_coefficient=-1.0),)))
    with pytest.raises(PerennialError, match=r"strength is 0\.0, but it must be above 0"):
        validate(replace(config, recipe=(Anchored(strength=0.0),)))


def test_one_number_switches_the_gate_on(config):
    assert config.gate.max_forgetting is None
    gated = validate(overrides.apply(config, {"gate.max-forgetting": "3", "gate.scales": ""}))
    assert (gated.gate.max_forgetting, gated.gate.scales) == (3.0, ())
    assert overrides.from_json(Config, module.to_json(gated)) == gated
    assert validate(overrides.apply(gated, {"schedule": "joint"})).gate.held_out == 2  # which guards one that there is
    assert validate(overrides.apply(gated, {"strategies": "retain"})).strategies[0].chain == "running"


def test_joint_learning_is_guarded_by_what_is_there_from_the_start(config):
    joint = overrides.apply(config, {"schedule": "joint"})
    shown = {"demonstrations": "shown", "variant": "ut2026"}
    for strategy in (L2(), KLAnchor(), EMA(), SLCA(), EWC(pretraining="shown"), Replay(**shown), DarkReplay(**shown)):
        validate_settings(replace(joint, strategies=(strategy,)))


def test_a_strategy_that_the_policy_cannot_serve_is_refused(config, monkeypatch):
    needy = replace(config, strategies=(Needy(),))
    assert validate(needy) is needy  # the toy policy has logits
    monkeypatch.setattr(ToyPolicy, "logits", Policy.logits)
    with pytest.raises(PerennialError, match=r"'needy' needs `logits`, which the policy 'perennial\.testing\.toy'"):
        validate(needy)


def test_ppo_is_refused_where_the_policy_has_no_values(config, monkeypatch):
    critic = overrides.apply(config, {"recipe": "ppo", "recipe.ppo.entropy_coefficient": "0.01"})
    assert validate(critic) is critic
    monkeypatch.setattr(ToyPolicy, "value", Policy.value)
    sentence = r"^'ppo' needs `value`, which the policy '[\w.]+' does not have; choose another recipe or policy\.$"
    with pytest.raises(PerennialError, match=sentence):
        validate(critic)


def test_what_a_strategy_chooses_to_act_is_not_the_learner_itself(config):
    shared = overrides.apply(config, {"workers.backend": "shared"})
    assert validate(shared) is shared
    with pytest.raises(
        PerennialError, match=r"^'expansion' chooses the weights that act, .*set --workers\.backend inl"
    ):
        validate(overrides.apply(shared, {"strategies": "expansion"}))


def test_a_settled_run_finds_its_folders_from_everywhere(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {
        "policy.checkpoint": "base",
        "recipe": "sft",
        "recipe.sft.demonstrations": "narrow",
        "strategies": "ewc",
        "strategies.ewc.pretraining": "../wide",
    }
    found = module.settled(overrides.apply(config, given))
    assert found.policy.checkpoint == str(tmp_path / "base")
    assert found.recipe[0].demonstrations == str(tmp_path / "narrow")
    assert found.recipe[0].pretraining == ""  # none is mixed in
    assert found.strategies[0].pretraining == str(tmp_path / "../wide")
    assert module.settled(found) == found


def test_a_settled_run_finds_what_was_downloaded_from_everywhere(config, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--openvla--openvla-7b"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc123")
    (cached / "snapshots" / "abc123").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    short = overrides.apply(config, {"policy.checkpoint": "openvla/openvla-7b"})
    assert module.settled(short).policy.checkpoint == "hub:openvla/openvla-7b"
    (tmp_path / "openvla" / "openvla-7b").mkdir(parents=True)  # a folder comes first
    assert module.settled(short).policy.checkpoint == str(tmp_path / "openvla" / "openvla-7b")


@pytest.mark.parametrize("named", ["bundled:metaworld-small", "hub:openvla/openvla-7b"])
def test_a_checkpoint_that_is_named_keeps_its_name(config, named):
    settled = module.settled(overrides.apply(config, {"policy.checkpoint": named}))
    assert settled.policy.checkpoint == named


def test_phases_are_tasks_one_by_one_or_all_at_once(config):
    assert config.phases == (("left",), ("right",))
    assert replace(config, schedule="joint").phases == (("left", "right"),)


@pytest.mark.parametrize("name", discovery.names("presets"))
def test_every_preset_says_what_it_is_and_teaches_tasks_of_its_suite(name):
    config = preset(name)
    assert isinstance(config, Config)
    assert config.tasks != Tasks(())
    assert discovery.describe(discovery.names("presets")[name])


def test_a_module_that_misses_something_is_no_unknown_name(tmp_path, monkeypatch):
    (tmp_path / "house").mkdir()
    (tmp_path / "house" / "needs.py").write_text("import no_such_simulator\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_simulator"):
        preset("house.needs")


def test_an_unknown_preset_is_answered_with_the_nearest_ones():
    with pytest.raises(PerennialError, match=r"no preset 'demoo'\. Did you mean demo"):
        preset("demoo")
    with pytest.raises(PerennialError, match=r"no module 'toyhouse\.nothing' for a preset"):
        preset("toyhouse.nothing")
