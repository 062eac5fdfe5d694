"""A name that is set for a while, and the parts of a layer that other forms replace."""

import contextlib
import copy
import types

import pytest

from ahn.engine.patch import patched
from ahn.memory.handle import layers_of
from conftest import storing, tiny


@pytest.mark.parametrize("before", [{}, {"name": 1}])
def test_a_name_is_as_it_was_before(before):
    owner = types.SimpleNamespace(**before)
    with patched(owner, "name", 2):
        with patched(owner, "name", 3):
            assert owner.name == 3
        assert owner.name == 2
    assert vars(owner) == before
    with contextlib.suppress(KeyError), patched(owner, "name", 2):
        raise KeyError
    assert vars(owner) == before


def test_the_class_of_an_instance_is_left_alone():
    layer = tiny().model.layers[0]
    before = dict(vars(layer))
    with patched(layer, "forward", None):
        assert type(layer).forward is not None and layer.forward is None
    assert vars(layer) == before and layer.forward.__self__ is layer


def test_the_tiers_of_a_copied_model_are_its_own():
    model = storing("learned")
    for layer in layers_of(copy.deepcopy(model)):
        assert layer.last.cell is layer.cell and layer.kept.store is layer.store
        assert layer.last.forms.prepare.__self__ is layer.last and layer.last.forms.gate_inputs.__self__ is layer.cell
        assert layer.sizes is layer.kept.sizes is layer.positions.sizes is layer.last.positions.sizes
        assert layer.positions.rotary.rotate.__self__ is layer.positions.rotary
