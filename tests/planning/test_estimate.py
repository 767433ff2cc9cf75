"""The plan's arithmetic."""

from dataclasses import replace

import pytest

from perennial.planning import estimate
from perennial.planning.estimate import Stage, Use, Work
from perennial.planning.gpus import GPUS
from perennial.policies import _anatomy
from perennial.policies._anatomy import Anatomy, Layer, Visit
from perennial.policies.openvla import OpenVLA
from perennial.policies.openvla_oft import OpenVLAOFT
from perennial.policies.pi0 import PI0
from perennial.policies.smolvla import SmolVLA

SENTENCE = "pick up the black bowl next to the plate and put it on the plate"
BY_NAME = {gpu.name: gpu for gpu in GPUS}
OFT = Use(OpenVLAOFT.anatomy(None, SENTENCE), rank=32, dtype="bfloat16", stages=(Stage(8),), slots=8)


def test_the_published_openvla_takes_what_its_users_report():
    """7.5 G numbers; acting about 16 GB, LoRA r = 32 about 25 GB at batch 1 and 62 GB at batch 8 (OpenVLA-OFT's README,
    whose model keeps a second view and checkpoints nothing)."""
    one = replace(OFT, stages=(Stage(1),), actors=0)
    assert _anatomy.parameters(OFT.anatomy) == pytest.approx(7.5e9, rel=0.02)
    assert _anatomy.adapter_parameters(OFT.anatomy, OFT.learning(Stage())) == pytest.approx(110e6, rel=0.15)
    assert estimate.memory(one).weights == pytest.approx(15e9, rel=0.03)
    used = estimate.memory(one)
    assert 18e9 < used.always + used.update < 25e9
    eight = estimate.memory(replace(one, stages=(Stage(8),)))
    assert 40e9 < eight.always + eight.update < 62e9


def test_pi0_has_the_published_size():
    assert _anatomy.parameters(PI0.anatomy(None, SENTENCE)) == pytest.approx(3.24e9, rel=0.04)


def test_smolvla_has_the_published_size():
    """450 million with the word head, which is published and not read."""
    assert _anatomy.parameters(SmolVLA.anatomy(None, SENTENCE)) + 49280 * 960 == pytest.approx(450e6, rel=0.001)


def test_networks_say_how_long_states_and_actions_are():
    """As published: for LIBERO, for six joints, and without a state."""
    found = {kind: kind.anatomy(None, SENTENCE) for kind in (PI0, SmolVLA, OpenVLA)}
    lengths = {kind: (anatomy.state_dim, anatomy.action_dim) for kind, anatomy in found.items()}
    assert lengths == {PI0: (8, 7), SmolVLA: (6, 6), OpenVLA: (None, 7)}


def test_a_forward_pass_takes_two_operations_for_each_weight_and_position():
    """The textbook's 2 N T, plus attention, for the language model of OpenVLA."""
    (language,) = (p for p in OpenVLA.anatomy(None, SENTENCE).parts if getattr(p, "group", "") == "language")
    length = language.learning[0].positions
    numbers = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    expected = 2 * numbers * length + 4 * 32 * length**2 * 4096
    assert _anatomy.arithmetic(language, language.learning[0]) == expected


TOY = Anatomy((Layer("vision", 1000, 1000, Visit(10), Visit(10), bias=False),), {"language": 5}, 4)


def test_memory_is_the_sum_of_its_parts():
    found = estimate.memory(Use(TOY, rank=4, stages=(Stage(2),), slots=3, actors=2))
    assert found.weights == 4 * 1_000_005
    assert found.actors == 2 * found.weights
    assert found.adapter == 4 * 8000
    assert found.moments == 2 * found.adapter
    assert found.gradients == found.adapter
    assert found.kept == 2 * 10 * (4 * 1000 + 4 * 4)
    assert found.peak == found.always + max(found.broadcast, found.acting, found.update)
    assert estimate.memory(Use(TOY, rank=None, dtype="bfloat16")).moments == 2 * 2 * 1_000_005
    assert estimate.memory(Use(TOY, rank=4, actors=5, shared=True)).actors == found.weights


def test_a_decision_is_bound_by_reading_when_alone_and_by_arithmetic_in_numbers():
    h100 = BY_NAME["H100 80 GB"]
    alone = estimate.decision_seconds(Use(TOY, 4, dtype="bfloat16"), h100, 1, 0.5)
    assert alone == pytest.approx(2 * 1_000_000 / h100.bandwidth)
    many = estimate.decision_seconds(Use(TOY, 4, dtype="bfloat16"), h100, 10_000, 0.5)
    assert many == pytest.approx(2e6 * 10 * 10_000 / (0.5 * h100.rate))


def test_autoregressive_decoding_reads_the_language_model_for_every_token():
    openvla = Use(OpenVLA.anatomy(None, SENTENCE), 32, dtype="bfloat16")
    a100 = BY_NAME["A100 80 GB"]
    seconds = estimate.decision_seconds(openvla, a100, 1, 1.0)
    assert 6 * 2 * 6.48e9 / a100.bandwidth < seconds < 9 * 2 * 6.48e9 / a100.bandwidth
    assert estimate.decision_seconds(OFT, a100, 1, 1.0) < 0.35 * seconds


def test_time_is_work_over_rates():
    gpu = BY_NAME["A100 80 GB"]
    use = Use(TOY, 4, dtype="bfloat16", slots=1)
    found = estimate.time(use, gpu, Work(decisions=30, evaluated=70, rows=(200,), env_steps=1000), 0.5, 50.0)
    assert found.simulating == 20
    assert found.acting == pytest.approx(100 * estimate.decision_seconds(use, gpu, 1, 0.5))
    adapter = 3 * 2 * 4 * 2000 * 10
    assert found.learning == pytest.approx(200 * (2 * 2e6 * 10 + adapter) / (0.5 * gpu.rate))
    assert found.total == found.simulating + found.acting + found.learning
    again = estimate.time(replace(use, rank=None), gpu, Work(0, 0, (200,), 0), 0.5, 50.0)
    assert again.learning == pytest.approx(200 * 3 * 2e6 * 10 / (0.5 * gpu.rate))


def test_switches_are_turned_until_it_fits_and_no_further():
    assert estimate.switches(OFT, BY_NAME["H100 80 GB"].room) == ()
    heavy = replace(OFT, dtype="float32", stages=(Stage(64),), actors=4)
    for gpu in GPUS:
        found = estimate.switches(heavy, gpu.room)
        if found is None:
            assert gpu.room < 2 * 15.1e9 + estimate.memory(OFT).broadcast
            continue
        assert estimate.memory(estimate.apply(heavy, found)).peak <= gpu.room
        chain = [heavy, *(lighter for _, lighter in estimate.remedies(heavy))]
        before = chain[chain.index(estimate.apply(heavy, found)) - 1]
        assert estimate.memory(before).peak > gpu.room
    assert estimate.switches(heavy, BY_NAME["H200 141 GB"].room)[:2] == (
        "--workers.backend inline",
        "--policy.dtype bfloat16",
    )
    assert estimate.switches(heavy, BY_NAME["RTX 4090 24 GB"].room) is None


def test_a_learner_that_acts_itself_needs_no_copy():
    own = replace(OFT, lent=True)
    saved = estimate.memory(OFT).always - estimate.memory(own).always
    assert saved == estimate.memory(OFT).weights
    assert estimate.memory(own).broadcast == 0
    assert estimate.memory(own).acting == estimate.memory(OFT).acting
    tight = replace(OFT, actors=4, lendable=True)
    assert estimate.switches(tight, estimate.memory(own).peak) == ("--workers.backend shared",)


def test_the_switches_found_make_it_fit_however_many_it_takes():
    heavy = replace(OFT, rank=None, dtype="float32", stages=(Stage(64),), actors=4)
    for lighter in [heavy, *(lighter for _, lighter in estimate.remedies(heavy))]:
        room = estimate.memory(lighter).peak
        assert estimate.memory(estimate.apply(heavy, estimate.switches(heavy, room))).peak <= room


def test_checkpointing_keeps_less_and_computes_more():
    again = replace(OFT, recompute=True)
    assert estimate.memory(again).kept < 0.12 * estimate.memory(OFT).kept
    work = Work(0, 0, (1000,), 0)
    plain, slower = (estimate.time(use, GPUS[0], work, 1, 1).learning for use in (OFT, again))
    assert 1.4 * plain < slower < 1.5 * plain
