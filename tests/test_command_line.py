"""Whatever is asked on the command line is done, or refused in one line; and it ends as it should."""

from __future__ import annotations

import io
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from conftest import fuzz
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_project import write_project

import earlyexit
from earlyexit.__main__ import _parser, main
from earlyexit.exits.policy import ExitPolicy
from earlyexit.models.checkpoints import save_model
from earlyexit.runs.paths import HOME_VARIABLE, PACKAGE
from earlyexit.runs.provenance import Record
from earlyexit.runs.published import Published
from earlyexit.training.resume import TrainingState

# ------------------------------------------------------------------ a short fuzz

VALUES = st.one_of(
    st.sampled_from(
        ["0", "-1", "1", "2", "nan", "1e400", "null", "true", "[]", "[0]", '"x"', "{}", "nope", "",
         "[" * 9999, "\ud800", "a\0b", "../x", "99999999999999999999", "~", "é≥"]
    ),
    st.text(max_size=8),
)  # fmt: skip
KEYS = [
    "n_layers",
    "corpus",
    "output_head",
    "rows",
    "epochs",
    "threads",
    "hub",
    "tokenizer",
    "x",
    "",
]
COMMANDS = [
    "run", "status", "compare", "readme", "report", "doctor", "names", "bench", "predict",
    "generate",
]  # fmt: skip
OPTIONS = st.one_of(
    st.tuples(st.just("--set"), st.builds("{}={}".format, st.sampled_from(KEYS), VALUES)),
    st.tuples(st.sampled_from(["--profile", "--device", "--only", "--data-dir", "--set"]), VALUES),
    st.tuples(st.sampled_from(["--seeds", "--threads"]), VALUES, st.just("1")),
)


@pytest.mark.slow
@fuzz(60)
@given(options=st.lists(OPTIONS, max_size=3))
@example(options=[("--seeds", "1", "1")])
@example(options=[("--set", "corpus=folder")])
@example(options=[("--data-dir", 5000 * "[")])
def test_a_dry_run_answers_or_refuses_in_one_line(tmp_path_factory, monkeypatch, capsys, options):
    root = tmp_path_factory.getbasetemp() / "fuzzed"
    if not root.exists():
        write_project(root)
    monkeypatch.setenv(HOME_VARIABLE, str(root))
    files = sorted(root.rglob("*"))
    arguments = [word for option in options for word in option]
    try:
        code = main(["run", "--profile", "smoke", *arguments, "--dry-run"])
    except SystemExit as error:  # argparse; its usage takes several lines
        assert error.code == 2
    else:
        said = capsys.readouterr()
        assert code in (0, 2)
        assert said.err.count("\n") == (code == 2) and bool(said.out) == (code == 0)
    capsys.readouterr()
    assert sorted(root.rglob("*")) == files


# ------------------------------------------------------------------ help, and the index of names


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_an_example_that_is_understood(capsys, command):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    said, _, example = capsys.readouterr().out.rpartition("Example: ")
    program, _, arguments = " ".join(example.split()).partition("earlyexit ")
    assert program == "python -m " and arguments.split()[0] == command
    assert said and _parser().parse_args(shlex.split(arguments)).command


def test_the_index_of_names_is_the_face_with_a_line_each(capsys):
    assert main(["names"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == earlyexit.__all__
    assert all(len(line.split()) > 3 and not line.endswith(" None") for line in lines)


# ------------------------------------------------------------------ signals, encodings, places


def python(source: str, **environment: str) -> list:
    """A command, and the environment in which it runs the package of this test."""
    variables = os.environ | {"PYTHONPATH": str(PACKAGE.parent)} | environment
    return [[sys.executable, "-c", source], variables]


@pytest.mark.slow
def test_a_termination_ends_as_an_interruption():
    source = (
        "import sys, time\n"
        "from earlyexit import __main__ as command\n"
        "from earlyexit.commands import studies\n"
        "studies._status = lambda options: print('ready', flush=True) or time.sleep(60)\n"
        "sys.exit(command.main(['status']))"
    )
    command, environment = python(source)
    pipe = subprocess.PIPE
    started = subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)
    assert started.stdout.readline() == "ready\n"
    started.send_signal(signal.SIGTERM)
    assert "interrupted; what was finished before is kept" in started.communicate(timeout=30)[1]
    assert started.returncode == 130


def test_output_survives_an_encoding_that_lacks_a_sign(tmp_path, monkeypatch):
    monkeypatch.setenv(HOME_VARIABLE, str(write_project(tmp_path)))
    written = {name: io.BytesIO() for name in ("stdout", "stderr")}
    for name, buffer in written.items():
        monkeypatch.setattr(sys, name, io.TextIOWrapper(buffer, "cp1252", write_through=True))
    assert main(["run", "--dry-run", "--set", "bk_heads=0"]) == 2
    print("at least ≥")
    assert written["stdout"].getvalue() == b"at least ?\n"
    assert b"bk_heads=0: must be ? 1" in written["stderr"].getvalue()


@pytest.mark.slow
def test_a_package_that_cannot_be_written_works_without_a_home(tmp_path):
    """Root may write anywhere: a file stands where a folder for compiled code would be made."""
    shutil.copytree(PACKAGE, tmp_path / "earlyexit", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in {path.parent for path in (tmp_path / "earlyexit").rglob("*.py")}:
        (folder / "__pycache__").write_text("")
    source = (
        "import os, torch, earlyexit\n"
        "print(earlyexit.__file__, os.environ['NUMBA_CACHE_DIR'])\n"
        "earlyexit.BKCore(2)(torch.zeros(1, 3, 2))"
    )
    command, environment = python(source, PYTHONPATH=str(tmp_path), HOME="/proc/nowhere")
    environment.pop("XDG_CACHE_HOME", None)
    environment.pop("NUMBA_CACHE_DIR", None)
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, check=True, text=True
    )
    file, folder = done.stdout.split()
    assert file == str(tmp_path / "earlyexit/__init__.py")
    assert not Path(folder).exists()  # it was of that process


@contextmanager
def no_room(size: int = 100):
    """Files may not grow beyond ``size`` bytes, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def writers(make_model) -> dict:
    """Kind of file → a function that writes it to a path."""
    model = make_model()
    record = Record("01", "cpu", "0" * 300, "", {}, None, None, {}, {}, "")
    return {
        "model": lambda path: save_model(model, path),
        "policy": lambda path: ExitPolicy.constant(0.5, 99).save(path),
        "record": lambda path: record.write(path.parent),
        "state": lambda path: TrainingState(path.parent, {"a": 1}).save(model, AnyState(), {}),
    }


class AnyState:
    def state_dict(self) -> dict:
        return {}


@pytest.mark.parametrize("kind", ["model", "policy", "record", "state"])
def test_a_full_disk_names_the_file_and_leaves_the_old_one(make_model, tmp_path, kind):
    write = writers(make_model)[kind]
    with suppress(FileNotFoundError):
        write(tmp_path / "file")
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()
    with no_room(), pytest.raises(OSError) as full:
        write(tmp_path / "file")
    assert str(path) in str(full.value)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_a_probe_that_cannot_be_is_refused_before_a_model_is_read(monkeypatch, capsys):
    monkeypatch.setattr("earlyexit.runs.decoders.open_decoder", None)
    for arguments in (
        ["--tokens", "0"],
        ["--epsilon", "0"],
        ["--corpus", "folder"],
        ["--text", "none"],
    ):
        assert main(["probe", "any", *arguments]) == 2
        said = capsys.readouterr().err
        assert said.startswith("earlyexit: ") and said.count("\n") == 1


def test_a_text_is_continued_as_its_words_come(make_model, corpus, monkeypatch, capsys):
    published = Published(make_model(), corpus, None, None)
    monkeypatch.setattr("earlyexit.load", lambda *_: published)
    said = {}
    for options in ([], ["--drafts", "3"], ["--full-depth"]):
        assert main(["generate", "--prompt", "3", "--words", "6", *options]) == 0
        told = capsys.readouterr().out
        text, _, pace = told.rpartition("\n\n")
        said[tuple(options)] = text.split()
        assert re.fullmatch(r"[\d,]+ words per second, \d\.\d\d of 3 layers per word\n", pace)
    prompt = torch.tensor([[5]])
    ids = published.model.generate(prompt, 6)[0]
    wanted = " ".join(corpus.decode(ids[0].tolist())).replace("<eos>", "").split()
    assert list(said.values()) == [wanted] * 3


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--prompt", " "], "none with a word"),
        (["--prompt", "3", "--words", "-1"], "n_new=-1: must be ≥ 0"),
        (["--prompt", "3", "--words", "40"], "exceed n_seq=12"),
        (["--prompt", "3", "--top-p", "0"], "top_p=0.0"),
        (["--prompt", "3", "--temperature", "nan"], "temperature=nan"),
    ],
)
def test_what_cannot_be_continued_is_refused(
    make_model, corpus, monkeypatch, capsys, options, told
):
    published = Published(make_model(), corpus, None, None)
    monkeypatch.setattr("earlyexit.load", lambda *_: published)
    assert main(["generate", *options]) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1


def test_an_error_comes_with_its_trace_if_that_is_asked_for(tmp_path):
    """The one line that is said without it leaves a programming error without a place."""
    said = {}
    for debug in ("", "1"):
        (tmp_path / f"home{debug}").mkdir()
        about = {
            HOME_VARIABLE: str(write_project(tmp_path / f"home{debug}")),
            "EARLYEXIT_DEBUG": debug,
        }
        command = [sys.executable, "-m", "earlyexit", "report", "--profile", "smoke"]
        done = subprocess.run(command, env=os.environ | about, capture_output=True, text=True)
        assert done.returncode == 1
        said[debug] = done.stderr
    assert "Traceback" in said["1"] and "RunError" in said["1"] and "Traceback" not in said[""]
