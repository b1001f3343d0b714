"""The front door of the wrapper study: which part a word opens, and what it says to those who do not know."""

import pytest

from experiments import wrappers, wrappers_compile, wrappers_pcfg, wrappers_tracr


@pytest.mark.parametrize(
    ("words", "said"), [([], "say which part"), (["pcgf"], "'pcgf'"), (["--quiet", "tracr"], "'--quiet'")]
)
def test_no_word_or_a_wrong_one_is_one_line(capsys, words, said):
    assert wrappers.main(words) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert (
        not out and line.startswith("error: ") and said in line and "tracr, pcfg, compile" in line and "--help" in line
    )


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_names_the_parts(capsys, word):
    assert wrappers.main([word]) == 0
    out, err = capsys.readouterr()
    assert (
        not err
        and "wrappers tracr " in out
        and "wrappers pcfg " in out
        and "wrappers compile " in out
        and "2311.12786" in out
    )


def test_a_word_hands_the_rest_over(monkeypatch):
    heard = []
    for name, part in (("tracr", wrappers_tracr), ("pcfg", wrappers_pcfg), ("compile", wrappers_compile)):
        monkeypatch.setattr(part, "main", lambda argv, name=name: heard.append((name, argv)) or 7)
    assert [wrappers.main(words) for words in (["tracr", "--seeds", "2"], ["compile"], ["pcfg", "--quiet"])] == [7] * 3
    assert heard == [("tracr", ["--seeds", "2"]), ("compile", []), ("pcfg", ["--quiet"])]
    monkeypatch.setattr("sys.argv", ["wrappers", "tracr", "--quiet"])
    assert wrappers.main() == 7 and heard[-1] == ("tracr", ["--quiet"])


def test_help_of_the_study_teaches(capsys, monkeypatch):
    monkeypatch.setattr(wrappers_tracr.parallel, "use_all_cores", lambda: None)
    with pytest.raises(SystemExit) as stopped:
        wrappers.main(["tracr", "--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    for word in ("--preset", "--rates", "--correlations", "C_Tr", "(ours)", "paper: 10,000", "examples:",
                 "python -m experiments.wrappers tracr --preset small", "goes on"):  # fmt: skip
        assert word in out, word
