"""Tables by name, and functions given just what they ask for."""

import pytest

from jaxrl.algorithms.choose import bind, choose


def shifted(x, *, by, scale=1):
    return (x + by) * scale


def test_a_name_is_looked_up_and_a_function_stands_for_itself():
    assert choose({"shifted": shifted}, "shifted", "rule") is shifted
    assert choose({}, shifted, "rule") is shifted


def test_an_unknown_name_is_an_error_with_a_suggestion():
    with pytest.raises(ValueError, match="Unknown rule 'shiftd'. Did you mean 'shifted'.* Known: shifted"):
        choose({"shifted": shifted}, "shiftd", "rule")


def test_a_function_is_given_only_what_it_names():
    assert bind(shifted, by=1, unrelated="x")(2) == 3


def test_a_value_of_none_leaves_the_default_in_place():
    assert bind(shifted, by=1, scale=None)(2) == 3


def test_a_function_that_takes_any_keyword_is_given_all():
    assert bind(lambda **everything: everything, a=1, b=2, c=None)() == {"a": 1, "b": 2}


def test_a_missing_ingredient_is_named():
    with pytest.raises(ValueError, match="'shifted' needs `by`"):
        bind(shifted, scale=2)
