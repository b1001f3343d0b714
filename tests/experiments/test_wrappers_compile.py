"""The command for people who write programs: what it prints, compares, saves and refuses."""

from __future__ import annotations

import errno
import re
import shlex
import textwrap

import jax
import pytest

from experiments import wrappers_compile as command
from synthetic import compiler, rasp

MINE = """\
import operator, sys
from synthetic.rasp import *

twice = tokens + tokens
_inner = Map(lambda token: token, tokens, "inner")
looped = (_inner + 1).named("looped")
object.__setattr__(_inner, "x", looped)
each = Select(indices, indices, operator.eq)
mean = Aggregate(each, tokens, numeric=True, name="mean")
number = 3

def upper():
    return Map(str.upper, tokens)

def late():
    return Map(
        lambda token: 1 // (ord(token) - 98),
        tokens,
        "late",
    )

def raises():
    raise ValueError("two\\nlines")

def needs(one):
    return one

def leaves():
    sys.exit(3)

def joins():
    return tokens & each

def wrong():
    return 3
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Models that compile faster than they run."""
    options = {"xla_backend_optimization_level": 0}
    jitted = jax.jit(compiler.output_logits, static_argnames=("layout", "position"), compiler_options=options)
    monkeypatch.setattr(compiler, "_output_logits", jitted)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def main(capsys, line: str) -> tuple[int, list[str]]:
    """Exit code and what is printed, runs of spaces as one."""
    code = command.main(shlex.split(line))
    out, err = capsys.readouterr()
    assert err == ""
    return code, [" ".join(line.split()) for line in out.splitlines()]


def error(capsys, line: str) -> str:
    code = command.main(shlex.split(line))
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and len(err) < 500, err
    return err.removeprefix("error: ").strip()


def test_the_examples_of_the_help(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command.main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and all(name in text for name in rasp.PROGRAMS)
    program = text[text.index("  import operator") : text.index("examples:")]
    (tmp_path / "mine.py").write_text(textwrap.dedent(program))
    lines = [
        line.removeprefix(f"  {command.COMMAND} ") for line in text.splitlines() if f"  {command.COMMAND} " in line
    ]
    found = [main(capsys, line) for line in lines]
    assert [code for code, _ in found] == [0, 0, 0, 0, 1]
    out = [lines for _, lines in found]
    assert out[0][0] == "program blocks heads head width width MLP width parameters compiled in"
    assert re.fullmatch(r"output 3 1 22 77 42 42,982 \d+\.\d\d s", out[0][1])
    assert out[0][3:6] == ["input a b c a", "program 2 2 0 0", "model 2 2 0 0"]
    assert out[0][7] == "checked: the model says what the program says on 200 random inputs of 1 to 20 tokens"
    assert out[1][1].startswith("shifted ") and out[1][3:] == ["input a b c", "program # a b", "model # a b"]
    assert out[2][3:] == ["input ( x )", "program True True True", "model True True True", "", "saved: runs/balanced"]
    assert out[3][3:6] == ["input 10 0 5", "program 0 5 10", "model 0 5 10"] and out[3][8] == "program 5 5"
    assert out[4][4].split()[:3] == ["program", "0", "12"] and out[4][5].split()[1:3] != ["0", "12"]
    assert out[4][6] == "^"
    assert compiler.run(compiler.load("runs/balanced"), [")("]) == [[False] * 2]


def test_a_wrong_model_is_shown_and_not_saved(capsys, mine):
    code, out = main(capsys, "histogram --vocab ab --length 8 --exactness 5 --check 60 --out model")
    head, first, note = out[3], out[5:9], out[-1]
    assert code == 1 and re.match(r"checked: the model differs from the program on \d+ of 60 random inputs", head)
    sequence = first[0].split()[1:]
    assert first[1].split()[1:] == [str(n) for n in rasp.evaluate(rasp.histogram(), sequence)]
    assert first[2].split()[1:] != first[1].split()[1:] and "^" in first[3]
    assert note.startswith("not saved") and not (mine / "model").exists()


def test_positions_that_are_not_compared_are_counted(capsys):
    code, out = main(capsys, "max_identifier --vocab abcdef --length 6 --check 30 --input fedcba --input aaa")
    assert code == 0 and out[3:6] == ["input f e d c b a", "program ? e - - - -", "model ? e - - - -"]
    assert out[8] == "program a - -"
    assert re.search(r"30 random inputs of 1 to 6 tokens \(\d+% of the positions have no single value", out[-1])


def test_a_function_gives_the_program_and_a_checkpoint_is_never_overwritten(capsys, mine):
    assert main(capsys, "mine.py:upper --vocab ab --length 2 --input ba --out model")[1][4] == "program B A"
    layout = compiler.load("model").layout
    assert layout.program == "upper" and layout.values == ("A", "B")
    line = "mine.py:upper --vocab ab --length 2 --out model"
    assert error(capsys, line) == "--out model exists, checkpoints are never overwritten; name another folder"


@pytest.mark.parametrize(
    "raised, why", [(OSError(errno.EACCES, "Permission denied"), "Permission denied"),
                    (ValueError("xx: No space left on device"), "the disk is full")]
)  # fmt: skip
def test_a_folder_that_cannot_be_written_to(capsys, monkeypatch, tmp_path, raised, why):
    def save(*_):
        raise raised

    monkeypatch.setattr(compiler, "save", save)
    assert command.main(["histogram", "--vocab", "a", "--length", "1", "--out", str(tmp_path / "x")]) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(f"error: --out .*x cannot be written: {why}; free space or name another folder\n", err)


def test_interrupted(capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(compiler, "compile_program", interrupt)
    assert command.main(["histogram", "--vocab", "a", "--length", "1"]) == 130
    assert capsys.readouterr().err == "interrupted: no checkpoint was written\n"


@pytest.mark.parametrize(
    "text, vocab, inputs",
    [
        ("abc", ["a", "b", "c"], {"cab": ["c", "a", "b"], "c a,b": ["c", "a", "b"], "b": ["b"]}),
        ("a, b,c", ["a", "b", "c"], {"cab": ["c", "a", "b"]}),
        ("one two", ["one", "two"], {"two": ["two"], "two one": ["two", "one"]}),
        ("one,", ["one"], {"one": ["one"]}),
        ("012", ["0", "1", "2"], {"21": ["2", "1"]}),
        ("0,1,2", [0, 1, 2], {"21": [2, 1], "2 1": [2, 1]}),
        ("-1,0,10", [-1, 0, 10], {"-1 10": [-1, 10], "10": [10], "7 0": ["7", 0]}),
        ("1,x", ["1", "x"], {"x1": ["x", "1"]}),
    ],
)
def test_how_tokens_are_read(text, vocab, inputs):
    tokens, characters = command._vocabulary(text)
    assert tokens == vocab and [type(token) for token in tokens] == [type(token) for token in vocab]
    assert {given: command._sequence(given, tokens, characters) for given in inputs} == inputs


def test_random_inputs_have_all_lengths_and_large_counts():
    rows = command._random([1, 2, 3], 7, 70, seed=1)
    assert sorted({len(row) for row in rows}) == list(range(1, 8)) and {token for row in rows for token in row} == {
        1,
        2,
        3,
    }
    assert [1] * 7 in rows or [2] * 7 in rows or [3] * 7 in rows
    assert rows == command._random([1, 2, 3], 7, 70, seed=1) != command._random([1, 2, 3], 7, 70, seed=2)


@pytest.mark.parametrize(
    "line, message",
    [
        ("revers --vocab ab --length 3", "unknown program 'revers'; did you mean reverse? Your own: FILE.py:NAME"),
        ("zzz --vocab ab --length 3", "unknown program 'zzz'; did you mean counter, max_identifier, reverse"),
        ("sort", "the following arguments are required: --vocab, --length; python -m experiments.wrappers"),
        ("sort --vocab ab --length x", "argument --length: 'x' is not a whole number; "),
        ("sort --vocab ab --length 0", "argument --length: 0 is too small, the least is 1; "),
        ("sort --vocab ab --length 3 --check 0", "argument --check: 0 is too small, the least is 1; "),
        ("sort --vocab ab --length 3 --lenght 3", "unrecognized arguments: --lenght 3; "),
        ("sort --vocab '' --length 3", "the vocabulary is empty; give at least one token"),
        ("sort --vocab aba --length 3", "the vocabulary holds 'a' "),
        ("sort --vocab ab --length 3 --exactness -1", "exactness is -1.0; it must be a positive number"),
        ("sort --vocab ab --length 3 --sharpness nan", "sharpness is nan; it must be a positive number"),
        ("sort --vocab ab --length 3 --input ''", "--input '' has no tokens; give at least one"),
        ("sort --vocab ab --length 3 --input ab --input axb", "sequence 1 has 'x' at position 1, which is not in"),
        ("sort --vocab 1,2 --length 3 --input 1,x", "sequence 0 has 'x' at position 1, which is not in the"),
        ("sort --vocab ab --length 3 --input abab", "sequence 0 has 4 tokens, the model is compiled for 3; shorten"),
        ("gone.py:x --vocab ab --length 3", "cannot read the program file gone.py: No such file or directory; give"),
        (".:x --vocab ab --length 3", "cannot read the program file .: Is a directory; give FILE.py:NAME"),
        ("latin.py:x --vocab ab --length 3", "cannot read the program file latin.py: it is not UTF-8 text; give"),
        ("syntax.py:x --vocab ab --length 3", "syntax.py, line 2: the file fails with SyntaxError: "),
        ("fails.py:x --vocab ab --length 3", "fails.py, line 3: the file fails with ZeroDivisionError: division by"),
        ("mine.py --vocab ab --length 3", "mine.py: say which program of it is meant, as mine.py:NAME; it has mean"),
        ("mine.py:twise --vocab ab --length 3", "mine.py has no 'twise'; it has twice"),
        ("mine.py:zzz --vocab ab --length 3", "mine.py has no 'zzz'; it has mean, twice, looped, upper, late, "),
        ("mine.py:each --vocab ab --length 3", "a program is a sequence, Select(indices, indices, eq) is a selector; "),
        ("mine.py:number --vocab ab --length 3", "a program is a sequence, 3 is a int; make one of rasp.tokens"),
        ("mine.py:wrong --vocab ab --length 3", "a program is a sequence, 3 is a int; make one of rasp.tokens"),
        ("mine.py:raises --vocab ab --length 3", "mine.py, line 23: raises() fails with ValueError: two lines; "),
        ("mine.py:needs --vocab ab --length 3", "mine.py: needs() fails with TypeError: needs() missing 1 required"),
        ("mine.py:leaves --vocab ab --length 3", "mine.py, line 29: leaves() fails with SystemExit: 3; correct it"),
        ("mine.py:joins --vocab ab --length 3", "mine.py, line 32: joins() fails with (tokens & Select(indices"),
        ("mine.py:looped --vocab ab --length 3", "the program has a cycle: looped -> inner -> looped; an expression"),
        ("mine.py:mean --vocab ab --length 3", "mean takes the mean of 'a', which is no number; map the values to"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(capsys, mine, line, message):
    (mine / "latin.py").write_bytes(b"x = '\xe4'")
    (mine / "syntax.py").write_text("x = 1\nx = = 2\n")
    (mine / "fails.py").write_text("def f():\n    # here\n    return 1 / 0\nf()\n")
    assert error(capsys, line).startswith(message)


def test_a_function_that_fails_on_a_value_is_shown_with_its_line(capsys, mine):
    message = error(capsys, "mine.py:late --vocab ab --length 3")
    assert (
        message.startswith("late: its function fails on 'b' (ZeroDivisionError: ") and "(mine.py, line 17)" in message
    )
