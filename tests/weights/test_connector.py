"""The connector's table follows from its parameters, whatever options they come from, and is strict both ways."""

import numpy as np
import pytest

from avlm_jax.assembly import assemble
from avlm_jax.state import flatten
from avlm_jax.weights import safetensors_io
from avlm_jax.weights.connector import connector_table, open_connector, save_connector
from avlm_jax.weights.table import WeightError
from tests.tiny_system import random_params, save_tokenizer, tiny_config

VARIANTS = {
    "global queries": (),
    "a group per frame": ("model.avts.scope=per_frame", "model.avts.time_scope=inside"),
    "plain attention, a table of times": ("model.avts.attention=plain", "model.time.f=table"),
    "no resampler, scalar time": ("model.avts.resampler=mlp", "model.time.f=scalar"),
}


def connector(tmp_path, *overrides) -> dict:
    return random_params(assemble(tiny_config(save_tokenizer(tmp_path / "tokenizer"), *overrides)))[
        "connector"
    ]


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_round_trip_to_the_bit(tmp_path, overrides):
    params = connector(tmp_path, *overrides)
    save_connector(tmp_path / "out", params)
    back = open_connector(tmp_path / "out", params)
    assert {path: leaf.read().tobytes() for path, leaf in back.leaves.items()} == {
        path: leaf.tobytes() for path, leaf in flatten(params).items()
    }


def test_names_and_layout_are_those_of_torch_modules(tmp_path):
    params = connector(tmp_path, "model.avts.scope=global", "model.avts.time_scope=all")
    save_connector(tmp_path / "out", params)
    stored = safetensors_io.read_folder(tmp_path / "out")
    flat = flatten(params)
    for theirs, ours in {
        "visual_mlp.fc1.weight": flat["visual_mlp/fc1/kernel"].T,
        "visual_mlp.fc1.bias": flat["visual_mlp/fc1/bias"],
        "tlp.weight": flat["tlp/kernel"].T,
        "resampler.queries": flat["resampler/queries"],
        "resampler.type_embed": flat["resampler/type_embed"],
        "resampler.layer_0.self.q.weight": flat["resampler/layer_0/self/q/kernel"].T,
        "resampler.layer_0.ln_self.weight": flat["resampler/layer_0/ln_self/scale"],
        "resampler.out.weight": flat["resampler/out/kernel"].T,
    }.items():
        np.testing.assert_array_equal(np.asarray(stored[theirs]), ours, err_msg=theirs)
    assert len(stored) == len(flat)


def test_every_wrong_tensor_is_named(tmp_path):
    params = connector(tmp_path)
    save_connector(tmp_path / "out", params)
    file = tmp_path / "out" / "model.safetensors"
    tensors = {name: np.array(tensor) for name, tensor in safetensors_io.read_file(file).items()}
    del tensors["visual_mlp.fc1.bias"]
    tensors["tlp.weight"] = tensors["tlp.weight"][:-1]
    tensors["visual_mlp.fc3.weight"] = np.zeros((2, 2), np.float32)
    safetensors_io.write_file(file, tensors)
    with pytest.raises(WeightError) as caught:
        open_connector(tmp_path / "out", params)
    assert len(caught.value.problems) == 3
    for name in ("visual_mlp.fc1.bias", "tlp.weight", "visual_mlp.fc3.weight"):
        assert any(name in problem for problem in caught.value.problems), name


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"a": {"kernel": np.zeros((2, 2)), "weight": np.zeros(2)}}, "both be called a.weight"),
        ({"a.b": {"bias": np.zeros(2)}}, "with dots"),
        ({"conv": {"kernel": np.zeros((3, 2, 2))}}, "no matrix"),
    ],
)
def test_parameters_that_no_torch_module_could_hold_are_refused(params, message):
    with pytest.raises(WeightError, match=message):
        connector_table(params)
