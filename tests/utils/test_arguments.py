"""Values in error messages."""

import numpy as np
import pytest
import torch

from diffusers_imagen.utils.arguments import SHOWN_CHARACTERS, bad_argument, class_of, shown


class Unprintable:
    def __repr__(self):
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    "value, text",
    [
        (torch.zeros(2, 3), "a Tensor of shape (2, 3)"),
        (np.zeros((2, 3)), "an array of shape (2, 3)"),
        (Unprintable(), "of class Unprintable"),
        (10**5000, "of class int"),  # Python does not print it
        ("a" * 1000, repr("a" * 1000)[:SHOWN_CHARACTERS] + "..."),
        ([1, "b"], "[1, 'b']"),
    ],
    ids=["tensor", "array", "unprintable", "large", "long", "list"],
)
def test_values_are_shown_in_one_short_line(value, text):
    assert shown(value) == text
    assert str(bad_argument("size", value, "a number")) == f"`size` is {text}, but should be a number."


def test_classes_are_named_without_an_article():
    assert class_of(torch.nn.Linear(1, 1)) == "of class Linear" and class_of(7) == "of class int"
