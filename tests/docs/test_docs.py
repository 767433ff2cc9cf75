"""Every command and every link in the documentation is tried, so that nobody copies one that has gone stale."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

from perennial import cli
from perennial.testing import strategy_conformance

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "REPRODUCE.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^ *```(bash|console|sh|shell) *\n(.*?)^ *``` *$", re.MULTILINE | re.DOTALL)
PYTHON_FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)\s]*)?\)")
CELL = re.compile(r"\| `(perennial \w+ [^`]+)` \|$", re.MULTILINE)
BEFORE_A_COMMAND = re.compile(r"do|time|nohup|[A-Z_]+=.*")
QUICK = {"list", "plan"}
"""Commands that are run as they stand; every other one is only parsed, except that `run` gets `--dry-run`."""


@dataclass(frozen=True)
class Command:
    """A shell command without its redirections, and the line on which its block begins."""

    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.line}: {shlex.join(self.words)}"


def commands(text: str) -> list[Command]:
    """The commands that call `perennial` or `make` in the fenced shell blocks and tables of a Markdown text."""
    found = []
    for cell in CELL.finditer(text):
        found += [Command(text.count("\n", 0, cell.start()) + 1, words) for words in split(cell[1])]
    for fence in FENCE.finditer(text):
        line = text.count("\n", 0, fence.start()) + 1
        source = fence[2].replace("\\\n", " ")
        for typed in source.splitlines():
            prompt, _, rest = typed.strip().partition("$ ")
            if fence[1] == "console" and (prompt or not rest):
                continue
            found += [Command(line, words) for words in split(rest if fence[1] == "console" else typed)]
    return [one for one in found if one.words[0] in ("perennial", "make")]


def split(line: str) -> list[tuple[str, ...]]:
    """The simple commands of a shell line; variables stand for 0, what is redirected is left out."""
    lexer = shlex.shlex(re.sub(r"\$\{?\w+\}?", "0", line), posix=True, punctuation_chars=True)
    lexer.wordchars += ":@%^+,"
    found: list[list[str]] = [[]]
    redirected = False
    for word in lexer:
        if set(word) <= set(";&|()"):
            found.append([])
            redirected = False
        elif set(word) <= set("<>"):
            redirected = True
        elif not redirected:
            found[-1].append(word)
    for words in found:
        while words and BEFORE_A_COMMAND.fullmatch(words[0]):
            words.pop(0)
    return [(Path(words[0]).name, *words[1:]) for words in found if words]


DOCUMENTED = [
    pytest.param(one.words, id=f"{page.name}:{one}")
    for page in PAGES
    if page.exists()
    for one in commands(page.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("words", DOCUMENTED)
def test_every_documented_command_is_understood(words, monkeypatch):
    program, *arguments = words
    if program == "make":
        tried = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        assert tried.returncode == 0, tried.stderr
        return
    understood(arguments, monkeypatch)


def understood(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse `arguments` with the real command line.

    Raises:
        SystemExit: with a code other than 0, if the command line refuses them.
    """
    for name, kind in cli.COMMANDS.items():
        if name not in {"run", *QUICK}:
            monkeypatch.setattr(kind, "__call__", lambda self: None)
    for user in ("learning.sft", "strategies.replay"):  # a reader brings demonstrations, or records them before
        monkeypatch.setattr(f"perennial.{user}.require_recorded", lambda *_: None)
    monkeypatch.setattr("perennial.suites._maniskill.on_plate.require", lambda thing: None)  # and RL4VLA's models
    monkeypatch.setattr("perennial.config.checkpoint_folder", lambda checkpoint: checkpoint)  # or downloads
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # and has a GPU
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    if arguments[:1] == ["run"] and not {"--dry-run", "--help"} & {*arguments}:
        arguments = [*arguments, "--dry-run"]
    try:
        cli.main(arguments)
    except SystemExit as stopped:
        if stopped.code not in (0, None):
            raise


@pytest.mark.parametrize("page", [page for page in PAGES if page.exists()], ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page):
    targets = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    assert [target for target in targets if not (page.parent / target).exists()] == []


EXAMPLES = [
    pytest.param(fence[1], id=f"{page.name}:{text.count(chr(10), 0, fence.start()) + 1}")
    for page in PAGES
    if page.exists()
    for text in [page.read_text(encoding="utf-8")]
    for fence in PYTHON_FENCE.finditer(text)
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_python_example_parses_and_imports_what_exists(example):
    for node in ast.walk(ast.parse(example)):
        if isinstance(node, ast.ImportFrom) and not node.module.startswith("my_package"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert importlib.util.find_spec(alias.name), alias.name


@pytest.mark.parametrize("check", strategy_conformance.CHECKS, ids=lambda check: check.__name__)
def test_the_example_strategy_conforms(check, monkeypatch):
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (source,) = [fence for fence in PYTHON_FENCE.findall(page) if "class Tether" in fence]
    module = types.ModuleType("tether")
    monkeypatch.setitem(sys.modules, "tether", module)  # dataclasses look their annotations up there
    exec(source, module.__dict__)
    check(lambda: module.Tether(coefficient=0.5))


SAMPLE = """
# A page
    ```bash
make setup PYTHON=python3.12
OMP_NUM_THREADS=1 .venv/bin/perennial run demo \\
    --recipe.grpo.groups 8   # a comment
pip install perennial
perennial compare runs/a runs/b --json > both.json && perennial list suites | head
for seed in 0 1 2; do perennial run demo --seed $seed; done
perennial run demo --policy.checkpoint bundled:metaworld-small
    ```
```console
$ perennial list presets
perennial is not typed here, it is the answer
$ ls
```
```python
perennial = "not a shell block"
```
Also `perennial nowhere` in a sentence.
"""


def test_commands_are_found_in_shell_blocks_only():
    assert [(one.line, " ".join(one.words)) for one in commands(SAMPLE)] == [
        (3, "make setup PYTHON=python3.12"),
        (3, "perennial run demo --recipe.grpo.groups 8"),
        (3, "perennial compare runs/a runs/b --json"),
        (3, "perennial list suites"),
        (3, "perennial run demo --seed 0"),
        (3, "perennial run demo --policy.checkpoint bundled:metaworld-small"),
        (12, "perennial list presets"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "list suites --json",
        "--version",
        "--help",
        "evaluate --help",
        "evaluate runs/demo-seed0 --variant ood_test --episodes 10",
        "resume runs/demo-seed0",
        "compare runs/a runs/b --json",
    ],
)
def test_good_commands_are_understood(line, monkeypatch):
    understood(line.split(), monkeypatch)


@pytest.mark.parametrize(
    "line",
    [
        "lst suites",
        "list sweets",
        "run no-such-preset",
        "run demo --recipe.grpo.gruops 8",
        "evaluate runs/demo-seed0 --episode 10",
        "evaluate runs/demo-seed0 --episodes ten",
        "resume",
    ],
)
def test_stale_commands_are_refused(line, monkeypatch):
    with pytest.raises(SystemExit) as stopped:
        understood(line.split(), monkeypatch)
    assert stopped.value.code not in (0, None)


def test_links_are_found_with_and_without_a_place_in_the_page():
    text = "[a](docs/x.md) ![b](img.png) [c](y.md#part) [d](https://example.org/z) [e](#here)"
    assert LINK.findall(text) == ["docs/x.md", "img.png", "y.md", "https://example.org/z"]
