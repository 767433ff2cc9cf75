import json
import subprocess
import sys

import pytest

from perennial import __version__, cli, discovery, experiment
from perennial.errors import LearningError, PerennialError
from perennial.evaluation import standalone
from perennial.testing.toy import ToySuite
from toyhouse.runs import CONFIG

HEAVY = {
    "torch",
    "numpy",
    "transformers",
    "peft",
    "mujoco",
    "metaworld",
    "matplotlib",
    "gymnasium",
    "scipy",
    "safetensors",
}


def call(*arguments):
    """Run the command line here; the exit code."""
    try:
        cli.main(arguments)
    except SystemExit as stop:
        return stop.code or 0
    return 0


@pytest.fixture
def sentence(capsys):
    """Run a command that fails; its exit code and its one line on standard error."""

    def run(*arguments):
        code = call(*arguments)
        output = capsys.readouterr()
        assert output.out == ""
        lines = output.err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("perennial: ")
        return code, lines[0].removeprefix("perennial: ")

    return run


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["--version"], ["list", "strategies"], ["run", "--help", "demo"]]
)
def test_help_and_lists_import_nothing_heavy(arguments):
    code = (
        "import json, sys\nfrom perennial import cli\n"
        f"try:\n    cli.main({arguments!r})\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "print(json.dumps(sorted(name for name in sys.modules if '.' not in name)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *shown, imported = done.stdout.splitlines()
    assert not HEAVY & set(json.loads(imported))
    assert "perennial" in imported
    assert shown


def test_python_m_perennial_is_the_command_line():
    done = subprocess.run([sys.executable, "-m", "perennial", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == __version__


def test_help_lists_every_command(capsys):
    assert call("--help") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rum"], "There is no command 'rum'. Did you mean run or resume?"),
        (["run", "demoo"], "There is no preset 'demoo'. Did you mean demo?"),
        (["run", "toyhouse.preset", "--seeed", "1"], "There is no setting '--seeed'."),
        (["run", "toyhouse.preset", "--seed", "x"], '--seed is "x", but it must be a whole number.'),
        (["run", "toyhouse.preset", "--seed"], "--seed has no value; overrides look like"),
        (["run", "toyhouse.preset", "stray"], "'stray' is not an option; overrides look like"),
        (
            ["run", "toyhouse.preset", "--policy.checkpoint", "nowhere"],
            "The checkpoint folder 'nowhere' does not exist",
        ),
        (["run", "toyhouse.preset", "--strategies", "ewcc"], "There is no strategy 'ewcc'. Did you mean ewc"),
        (["run", "[/red]"], "There is no preset '[/red]'."),
        (["resume", "nowhere"], "nowhere is not a run folder"),
        (["report", "nowhere"], "nowhere is not a run folder"),
        (["evaluate", "nowhere"], "The checkpoint folder 'nowhere' does not exist"),
        (["list", "suites", "--jsn"], "There is no option of `perennial list` '--jsn'. Did you mean --json"),
        (
            ["merge", "a", "b", "-o", "c", "--alpha.visoin", "1"],
            "There is no option of `perennial merge` '--alpha.visoin'. Did you mean --alpha.vision or --alpha.action",
        ),
        (["run", "--seed", "1", "demo"], "The name of a preset comes before overrides, as in `perennial run demo"),
        (["evaluate", "a", "--temperature", "nan"], "--temperature is nan, but it must be a finite number."),
        (["merge", "a", "b", "-o", "c", "--alpha.action", "inf"], "--alpha.action is inf, but it must be a finite"),
        (["pretrain", "a", "b", "--learning-rate=inf"], "--learning-rate is inf, but it must be a finite number."),
        (["plan", "demo", "--steps-per-second", "nan"], "--steps-per-second is nan, but it must be a finite number."),
    ],
)
def test_mistakes_are_answered_by_one_sentence_and_exit_code_2(sentence, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = sentence(*arguments)
    assert code == 2
    assert said.startswith(message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [([], "Missing subcommand"), (["list", "suits"], "Invalid choice"), (["resume"], "Required options")],
)
def test_incomplete_commands_say_what_is_missing(capsys, arguments, hint):
    assert call(*arguments) == 2
    assert hint in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("error", "code"), [(PerennialError("A."), 2), (LearningError("A."), 3), (KeyboardInterrupt(), 130)]
)
def test_exit_codes(sentence, monkeypatch, error, code):
    def fail(path):
        raise error

    monkeypatch.setattr(experiment, "resume", fail)
    assert sentence("resume", "somewhere")[0] == code


def test_overrides_reach_the_run(monkeypatch, toy_checkpoint, tmp_path):
    started = []
    monkeypatch.setattr(experiment, "start", lambda *arguments: started.append(arguments))
    overrides = ["--recipe.grpo.group-size=3", "--seed", "5", "--policy.checkpoint", str(toy_checkpoint)]
    assert call("run", "toyhouse.preset", *overrides, "--run-dir", str(tmp_path / "here")) == 0
    ((config, preset, path),) = started
    assert (config.recipe[0].group_size, config.seed) == (3, 5)
    assert config.tasks == CONFIG.tasks
    assert (preset, path) == ("toyhouse.preset", tmp_path / "here")


def test_a_dry_run_prints_the_configuration_and_starts_nothing(monkeypatch, toy_checkpoint, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiment, "start", lambda *_: pytest.fail("the run was started"))
    code = call("run", "toyhouse.preset", "--dry-run", "--seed=4", "--policy.checkpoint", str(toy_checkpoint))
    shown = json.loads(capsys.readouterr().out)
    assert code == 0
    assert (shown["seed"], shown["suite"], shown["recipe"][0]["name"]) == (4, "perennial.testing.toy", "grpo")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def no_simulator(monkeypatch, toy_checkpoint, tmp_path):
    """Arguments of a run whose suite finds no simulator, and an empty folder to be in."""

    def missing(suite):
        raise PerennialError("The toys are not installed; run [toys].")

    monkeypatch.setattr(ToySuite, "require_simulator", missing)
    monkeypatch.chdir(tmp_path)
    return "run", "toyhouse.preset", "--policy.checkpoint", str(toy_checkpoint)


def test_a_run_without_its_simulator_leaves_no_folder(no_simulator, sentence, tmp_path):
    code, said = sentence(*no_simulator)
    assert (code, said.strip()) == (2, "The toys are not installed; run [toys].")
    assert not list(tmp_path.iterdir())


def test_a_dry_run_without_the_simulator_prints_the_configuration_and_a_warning(no_simulator, capsys):
    assert call(*no_simulator, "--dry-run") == 0
    shown, warned = capsys.readouterr()
    assert json.loads(shown)["suite"] == "perennial.testing.toy"
    assert warned.strip() == "A run would stop: The toys are not installed; run [toys]."


@pytest.mark.parametrize("kind", ["suites", "policies", "strategies", "recipes", "presets", "studies", "trackers"])
def test_lists_are_for_people_and_for_programs(kind, capsys):
    assert call("list", kind, "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    room = {"recipes": "learning", "trackers": "tracking"}.get(kind, kind)
    assert [entry["name"] for entry in listed] == list(discovery.names(room))
    assert all(entry["description"] for entry in listed)
    assert call("list", kind) == 0
    shown = capsys.readouterr().out
    assert all(entry["name"] in shown for entry in listed)


def test_options_and_values_are_paired():
    assert cli.pairs(["--a.b", "1", "--c=2=3", "--d=", "--e", "-1"]) == {"a.b": "1", "c": "2=3", "d": "", "e": "-1"}


def test_names_may_be_separated_by_spaces_or_commas_in_every_command(monkeypatch):
    assert cli.pairs(["--tasks.trained", "left", "right", "--seed", "1"]) == {
        "tasks.trained": "left,right",
        "seed": "1",
    }
    asked = []
    monkeypatch.setattr(standalone, "evaluate", lambda options, console: asked.append(options.tasks))
    for typed in (["left", "up"], ["left,up"], ["left,", "up"], ["left", "up,left"]):
        assert call("evaluate", "run", "--tasks", *typed) == 0
    assert asked == [("left", "up")] * 4
    call("evaluate", "run", "--tasks", "")
    assert asked[-1] == ("",)  # no task, rather than all of them


@pytest.mark.parametrize("options", [["--dry-run"], ["--run-dir", "x", "--dry-run"]])
def test_options_of_the_command_may_come_before_the_preset(options, toy_checkpoint, capsys):
    assert call("run", *options, "toyhouse.preset", "--policy.checkpoint", str(toy_checkpoint)) == 0
    assert json.loads(capsys.readouterr().out)["seed"] == 0


def test_a_reader_that_has_seen_enough_is_no_error():
    command = [sys.executable, "-m", "perennial", "list", "strategies", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 1
