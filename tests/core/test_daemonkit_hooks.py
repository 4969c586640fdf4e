"""The [hooks] of a VM file."""

import pytest

from daemonkit.hooks import WORDS_MAX, BadHooks, Hooks, check_hooks, hooks_of


def test_words_are_a_list_or_are_split_without_a_shell():
    text = '[hooks]\nfreeze = "quiet \'my vm\' $HOME; rm"\nthaw = ["loud", "my vm"]\n'
    assert hooks_of(text) == Hooks(("quiet", "my vm", "$HOME;", "rm"), ("loud", "my vm"))


@pytest.mark.parametrize("text", ["", "name = 1", "not [ toml", "\0"])
def test_a_text_without_hooks_has_none(text):
    assert hooks_of(text) is None


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ("x", "is a table"),
        ({"freeze": "a"}, "thaw is missing"),
        ({"thaw": "a"}, "freeze is missing"),
        ({"freeze": "a", "thaw": "b", "melt": "c"}, "unknown key 'melt'"),
        ({"freeze": "", "thaw": "b"}, "a program first"),
        ({"freeze": [], "thaw": "b"}, "a program first"),
        ({"freeze": [""], "thaw": "b"}, "a program first"),
        ({"freeze": ["a"] * (WORDS_MAX + 1), "thaw": "b"}, "a program first"),
        ({"freeze": [1], "thaw": "b"}, "list of words"),
        ({"freeze": 1, "thaw": "b"}, "list of words"),
        ({"freeze": "a 'b", "thaw": "b"}, "freeze: No closing quotation"),
        ({"freeze": ["a", "x" * 5000], "thaw": "b"}, "at most"),
        ({"freeze": ["a\0b"], "thaw": "b"}, "zero byte"),
    ],
)
def test_what_makes_no_sense_is_refused(table, reason):
    with pytest.raises(BadHooks, match=reason):
        check_hooks(table)
