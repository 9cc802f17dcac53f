"""speechbrain's port of BEATs, importable without torchaudio, and models of it with sizes of ours."""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import sys
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch

from avlm_jax.encoders.beats import BeatsConfig

_MODULES = ("torchaudio", "torchaudio.compliance", "torchaudio.compliance.kaldi")


def _fbank(waveform, num_mel_bins, sample_frequency, frame_length, frame_shift):
    import kaldi_native_fbank

    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.samp_freq = sample_frequency
    options.frame_opts.frame_length_ms, options.frame_opts.frame_shift_ms = frame_length, frame_shift
    options.frame_opts.dither = 0.0
    options.mel_opts.num_bins = num_mel_bins
    online = kaldi_native_fbank.OnlineFbank(options)
    online.accept_waveform(sample_frequency, waveform[0].tolist())
    online.input_finished()
    return torch.from_numpy(np.stack([online.get_frame(k) for k in range(online.num_frames_ready)]))


@contextlib.contextmanager
def speechbrain_beats() -> Iterator[types.ModuleType]:
    """speechbrain.lobes.models.beats; Kaldi's own code stands in for torchaudio, whose filterbank it wants."""
    before = {name: sys.modules.get(name) for name in _MODULES}
    for name in _MODULES:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    sys.modules[_MODULES[-1]].fbank = _fbank
    sys.modules[_MODULES[0]].list_audio_backends = list
    try:
        yield importlib.import_module("speechbrain.lobes.models.beats")
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def build_beats(peer: types.ModuleType, config: BeatsConfig, num_classes: int | None) -> Any:
    """Their model of our sizes, in evaluation mode; fine-tuned with so many classes, or None for pretrained only.

    What our config does not name has the value of the released checkpoints' cfg.
    """
    cfg = dict(
        input_patch_size=config.patch_size, embed_dim=config.embed_dim, encoder_embed_dim=config.width,
        encoder_layers=config.depth, encoder_attention_heads=config.num_heads,
        encoder_ffn_embed_dim=config.mlp_dim, conv_pos=config.conv_pos_kernel,
        conv_pos_groups=config.conv_pos_groups, num_buckets=config.num_buckets,
        max_distance=config.max_distance, gru_rel_pos=config.gru_gate, deep_norm=config.deep_norm,
        relative_position_embedding=True, layer_wise_gradient_decay_ratio=0.6, encoder_layerdrop=0.05,
        finetuned_model=num_classes is not None, predictor_class=num_classes,
    )  # fmt: skip
    original = peer.BEATsConfig
    with mock.patch.object(peer, "BEATsConfig", lambda _: original(cfg)):
        return peer.BEATs().eval()
