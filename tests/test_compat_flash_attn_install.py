"""compat.flash_attn has flash-attn 2.8's names and signatures, and is found under its name."""

import importlib
import inspect
import subprocess
import sys
import textwrap

import pytest

import fastattn.compat.flash_attn as compat

# The public functions and classes of flash-attn 2.8.3, read from its source, without annotations.
SIGNATURES = {
    "flash_attn_interface": """
        flash_attn_qkvpacked_func(qkv, dropout_p=0.0, softmax_scale=None, causal=False,
            window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
            return_attn_probs=False)
        flash_attn_kvpacked_func(q, kv, dropout_p=0.0, softmax_scale=None, causal=False,
            window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
            return_attn_probs=False)
        flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False,
            window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
            return_attn_probs=False)
        flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, dropout_p=0.0,
            softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
            alibi_slopes=None, deterministic=False, return_attn_probs=False)
        flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
            max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1,
            -1), softcap=0.0, alibi_slopes=None, deterministic=False,
            return_attn_probs=False)
        flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
            max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1,
            -1), softcap=0.0, alibi_slopes=None, deterministic=False,
            return_attn_probs=False, block_table=None)
        flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, rotary_cos=None,
            rotary_sin=None, cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None,
            block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1),
            softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,
            return_softmax_lse=False)
    """,
    "bert_padding": """
        index_first_axis(input, indices)
        index_put_first_axis(values, indices, first_axis_dim)
        index_first_axis_residual(input, indices)
        unpad_input(hidden_states, attention_mask, unused_mask=None)
        unpad_input_for_concatenated_sequences(hidden_states, attention_mask_in_length)
        pad_input(hidden_states, indices, batch, seqlen)
    """,
    "layers.rotary": """
        apply_rotary_emb_func(x, cos, sin, interleaved=False, inplace=False,
            seqlen_offsets=0, cu_seqlens=None, max_seqlen=None)
        rotate_half(x, interleaved=False)
        apply_rotary_emb_torch(x, cos, sin, interleaved=False)
        apply_rotary_emb(x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0,
            cu_seqlens=None, max_seqlen=None)
        apply_rotary_emb_qkv_(qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False,
            seqlen_offsets=0, num_heads_q=None)
        apply_rotary_emb_kv_(kv, cos, sin, interleaved=False, seqlen_offsets=0)
        RotaryEmbedding(dim, base=10000.0, interleaved=False, scale_base=None, device=None)
        RotaryEmbedding.forward(qkv, kv=None, seqlen_offset=0, max_seqlen=None,
            num_heads_q=None)
    """,
    "ops.layer_norm": """
        layer_norm(x, weight, bias, epsilon)
        dropout_add_layer_norm(x0, residual, weight, bias, dropout_p, epsilon,
            rowscale=None, layerscale=None, prenorm=False, residual_in_fp32=False,
            return_dropout_mask=False)
        dropout_add_layer_norm_subset(x0, residual, weight, bias, dropout_p, epsilon,
            layerscale=None, x0_subset=None, out_subset=None, rowscale_const=1.0,
            out_numrows=0, prenorm=False, residual_in_fp32=False, return_dropout_mask=False)
        dropout_add_layer_norm_parallel_residual(x0, x1, residual, weight0, bias0, weight1,
            bias1, dropout_p, epsilon, prenorm=False, residual_in_fp32=False,
            return_dropout_mask=False)
        DropoutAddLayerNorm(hidden_size, prenorm=False, p=0.0, eps=1e-05,
            residual_in_fp32=False, device=None, dtype=None)
        DropoutAddLayerNorm.forward(x0, residual=None)
    """,
    "ops.rms_norm": """
        rms_norm(x, weight, epsilon)
        dropout_add_rms_norm(x0, residual, weight, bias, dropout_p, epsilon, rowscale=None,
            layerscale=None, prenorm=False, residual_in_fp32=False,
            return_dropout_mask=False)
        dropout_add_rms_norm_subset(x0, residual, weight, bias, dropout_p, epsilon,
            layerscale=None, x0_subset=None, out_subset=None, rowscale_const=1.0,
            out_numrows=0, prenorm=False, residual_in_fp32=False, return_dropout_mask=False)
        dropout_add_rms_norm_parallel_residual(x0, x1, residual, weight0, bias0, weight1,
            bias1, dropout_p, epsilon, prenorm=False, residual_in_fp32=False,
            return_dropout_mask=False)
        RMSNorm(hidden_size, eps=1e-05, device=None, dtype=None)
        RMSNorm.forward(x)
        DropoutAddRMSNorm(hidden_size, prenorm=False, p=0.0, eps=1e-05,
            residual_in_fp32=False, device=None, dtype=None)
        DropoutAddRMSNorm.forward(x0, residual=None)
    """,
    "ops.activations": """
        swiglu(x, y)
        swiglu_fwd(x, y)
        swiglu_bwd(x, y, g)
        bias_gelu_impl(input, bias)
        fast_gelu_impl(input)
        bias_gelu(y, bias)
        bias_gelu_back(g, y, bias)
        gelu_fwd(x)
        gelu_bwd(g, x)
        relu_bwd(g, x)
        sqrelu_fwd(x)
        sqrelu_bwd(g, x)
    """,
}

TOP = """flash_attn_func flash_attn_kvpacked_func flash_attn_qkvpacked_func flash_attn_varlen_func
flash_attn_varlen_kvpacked_func flash_attn_varlen_qkvpacked_func flash_attn_with_kvcache"""


def signatures(text):
    """One text for each signature, whose lines are indented deeper than the first one."""
    joined = textwrap.dedent(text).replace("\n    ", " ")
    return [line for line in joined.splitlines() if line]


def bare(signature):
    plain = [
        p.replace(annotation=inspect.Parameter.empty)
        for p in signature.parameters.values()
        if p.name != "self"
    ]
    return str(inspect.Signature(plain))


@pytest.mark.parametrize(
    ("module", "expected"),
    [(module, x) for module, text in SIGNATURES.items() for x in signatures(text)],
    ids=lambda x: x.partition("(")[0],
)
def test_signatures_are_those_of_flash_attn(module, expected):
    found = importlib.import_module(f"{compat.__name__}.{module}")
    for part in expected.partition("(")[0].split("."):
        found = getattr(found, part)
    assert expected.endswith(bare(inspect.signature(found))), inspect.signature(found)


def test_every_module_lists_exactly_these_names():
    for module, text in SIGNATURES.items():
        found = importlib.import_module(f"{compat.__name__}.{module}")
        names = {x.partition("(")[0].partition(".")[0] for x in signatures(text)}
        assert set(found.__all__) == names
    assert set(compat.__all__) == set(TOP.split())
    assert all(hasattr(compat, name) for name in compat.__all__)
    assert compat.__version__.startswith("2.8.")


def run(code):
    """Runs code in a process of its own, where nothing has been imported yet."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_installed_code_that_imports_flash_attn_finds_it_and_uninstalled_it_does_not():
    run(
        """
        import importlib.util, sys
        import fastattn.compat
        assert importlib.util.find_spec("flash_attn") is None
        fastattn.compat.install()
        fastattn.compat.install()
        from flash_attn import flash_attn_func, __version__
        from flash_attn.bert_padding import unpad_input
        from flash_attn.flash_attn_interface import flash_attn_varlen_func
        from flash_attn.ops.rms_norm import RMSNorm
        import flash_attn.layers.rotary
        assert importlib.util.find_spec("flash_attn") is not None
        assert flash_attn.layers.rotary is sys.modules["fastattn.compat.flash_attn.layers.rotary"]
        assert flash_attn.flash_attn_func is flash_attn_func
        import fastattn.compat.flash_attn as ours
        assert flash_attn is ours and ours.__name__ == "fastattn.compat.flash_attn"
        try:
            import flash_attn.losses.cross_entropy
        except ModuleNotFoundError:
            pass
        else:
            raise AssertionError("what is not there was found")
        import torch
        q = torch.randn(1, 3, 2, 8)
        assert flash_attn_func(q, q, q, causal=True).shape == q.shape
        fastattn.compat.uninstall()
        fastattn.compat.uninstall()
        assert not [name for name in sys.modules if name.split(".")[0] == "flash_attn"]
        assert importlib.util.find_spec("flash_attn") is None
        assert sys.modules["fastattn.compat.flash_attn"] is ours
        """
    )


def test_the_real_package_is_hidden_while_installed_and_comes_back(tmp_path):
    real = tmp_path / "flash_attn"
    (real / "losses").mkdir(parents=True)
    (real / "__init__.py").write_text("__version__ = 'real'")
    (real / "losses" / "__init__.py").write_text("")
    run(
        f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import flash_attn.losses
        real, losses = flash_attn, flash_attn.losses
        import fastattn.compat
        fastattn.compat.install()
        import flash_attn
        assert flash_attn.__version__ != "real"
        try:
            import flash_attn.losses
        except ModuleNotFoundError:
            pass
        else:
            raise AssertionError("a module of the hidden package was found")
        fastattn.compat.uninstall()
        import flash_attn.losses
        assert flash_attn is real and flash_attn.losses is losses
        """
    )


def test_transformers_is_not_told_that_there_is_a_distribution_of_flash_attn():
    pytest.importorskip("transformers")
    run(
        """
        import fastattn.compat
        fastattn.compat.install()
        from transformers.utils import is_flash_attn_2_available
        import transformers.modeling_flash_attention_utils
        assert not is_flash_attn_2_available()
        """
    )
