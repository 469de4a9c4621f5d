"""Writes the golden files of the affine integer schemes, from the packages that define them.

    pip install onnxruntime==1.31.1 onnx==1.23.2 numpy safetensors
    python tests/golden/make.py

Scales and zero points follow the written formulas in numpy float32, and are checked here against
`compute_scale_zp` (symmetric) and `DynamicQuantizeLinear` (uint8, tensor). Codes are onnxruntime's
`QuantizeLinear`, per tensor, along an axis, and in blocks; packed bytes are onnx's `raw_data` of the codes.
Every file is one scheme and mapping; its metadata says which packages wrote it and how each case lies.
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.quant_utils import compute_scale_zp
from safetensors.numpy import save_file

F = np.float32
TINY = F(2.0**-126)
MAX = np.finfo(F).max

# scheme, mapping: qmin, qmax, onnx type, numpy type, bits
SCHEMES = {
    ("int8", "symmetric"): (-127, 127, TensorProto.INT8, np.int8, 8),
    ("int8", "asymmetric"): (-128, 127, TensorProto.INT8, np.int8, 8),
    ("uint8", "asymmetric"): (0, 255, TensorProto.UINT8, np.uint8, 8),
    ("int4", "symmetric"): (-8, 7, TensorProto.INT4, ml_dtypes.int4, 4),
    ("uint4", "asymmetric"): (0, 15, TensorProto.UINT4, ml_dtypes.uint4, 4),
    ("int2", "symmetric"): (-2, 1, TensorProto.INT2, ml_dtypes.int2, 2),
    ("uint2", "asymmetric"): (0, 3, TensorProto.UINT2, ml_dtypes.uint2, 2),
}


def params(x, qmin, qmax, symmetric):
    """Scale and zero point over the last axis; all arithmetic in float32."""
    mn = np.minimum(x.min(axis=-1), F(0))
    mx = np.maximum(x.max(axis=-1), F(0))
    with np.errstate(all="ignore"):
        if symmetric:
            scale = np.maximum(-mn, mx) / F((qmax - qmin) / 2)
            zero = np.zeros_like(scale)
        else:
            scale = (mx - mn) / F(qmax - qmin)
            zero = np.clip(F(qmin) - np.rint(mn / scale), F(qmin), F(qmax))
    degenerate = scale < TINY
    scale = np.where(degenerate, F(1), scale).astype(F)
    zero = np.where(degenerate, F(0), zero).astype(np.int32)
    assert np.isfinite(scale).all()
    return scale, zero


def neighbours(x, ulps):
    """x moved by some units in the last place, away from zero for positive ones."""
    x = np.asarray(x, F)
    bits = np.abs(x).view(np.int32) + np.asarray(ulps, np.int32)
    return np.copysign(np.maximum(bits, 0).view(F), x)


def hard_rows(k, qmin, qmax, symmetric, rng):
    """Rows of k values, each row a different way to be hard."""
    span = (qmax - qmin) / 2 if symmetric else qmax - qmin
    top = F(qmax) if symmetric else F(qmax - qmin)
    rows = [rng.standard_normal(k) * 10.0**e for e in (-30, -3, 0, 0, 3, 30)]
    rows.append(rng.standard_normal(k) * 1e-40)  # subnormal: degenerate
    rows.append(np.zeros(k))
    rows.append(np.full(k, -0.0))
    rows.append(np.where(rng.random(k) < 0.5, 0.0, -0.0) + 0 * rng.random(k))
    rows += [np.full(k, c) for c in (1.0, -3.25, 1e-45, 2.0**-126, 127.0, 0.1)]
    rows += [np.abs(rng.standard_normal(k)), -np.abs(rng.standard_normal(k))]
    # Scales at, and around, the smallest normal number.
    for ulps in (-1, 0, 1):
        edge = neighbours(F(span) * TINY, ulps)
        rows.append(np.concatenate([[edge], rng.uniform(0, 1, k - 1).astype(F) * edge]))
    # A scale of 1, every tie and its neighbours.
    for sign in (1, -1):
        ties = (rng.integers(-int(span) - 1, int(span) + 1, k) + 0.5).astype(F)
        ties = neighbours(ties, rng.integers(-1, 2, k))
        ties = np.clip(ties, *((-F(span), F(span)) if symmetric else (F(qmin), F(qmax))))
        ties[0] = sign * F(span) if symmetric else F(qmin)
        ties[-1] = F(span) if symmetric and k == 1 else (ties[-1] if symmetric else F(qmax))
        rows.append(ties)
    # Ties of odd scales, met within two units in the last place.
    for _ in range(4):
        scale = F(rng.uniform(0.5, 2) * 2.0 ** rng.integers(-100, 100))
        n = rng.integers(0, int(top) + 1, k) * rng.choice([-1, 1], k) + 0.5
        near = neighbours((n * np.float64(scale)).astype(F), rng.integers(-2, 3, k))
        near[0] = F(span) * scale
        rows.append(np.clip(near, -np.abs(near[0]), np.abs(near[0])))
    # Powers of two, one unit off, over all exponents and over few.
    for low, high in ((-149, 127), (-6, 4)):
        powers = np.ldexp(F(1), rng.integers(low, high, k)).astype(F) * rng.choice([F(-1), F(1)], k)
        rows.append(neighbours(powers, rng.integers(-1, 2, k)))
    # The largest values; an asymmetric range must not overflow.
    huge = rng.uniform(0, 1, k).astype(F) * MAX
    huge[0] = MAX
    rows.append(huge * rng.choice([F(-1), F(1)], k) if symmetric else huge)
    rows.append(-huge)
    rows.append(rng.standard_t(2, k))
    return np.array([np.asarray(row, F) for row in rows], F)


def quantize_linear(x, scale, zero, onnx_type, np_type, axis=None, block=None):
    """onnxruntime's QuantizeLinear, as a code tensor of the scheme's own type."""
    attributes = {}
    if axis is not None:
        attributes["axis"] = axis
    if block is not None:
        attributes["block_size"] = block
    two_bit = onnx_type in (TensorProto.INT2, TensorProto.UINT2)
    opset = 25 if two_bit else 21
    wide = TensorProto.INT8 if np_type in (np.int8, ml_dtypes.int4, ml_dtypes.int2) else TensorProto.UINT8
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attributes),
            helper.make_node("Cast", ["q"], ["y"], to=wide),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", wide, x.shape)],
        initializer=[
            numpy_helper.from_array(np.asarray(scale, F), "s"),
            numpy_helper.from_array(np.asarray(zero).astype(np_type), "z"),
        ],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=13 if two_bit else 10
    )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0].astype(np_type)


def dynamic_quantize_linear(x):
    graph = helper.make_graph(
        [helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "s", "z"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [
            helper.make_tensor_value_info("y", TensorProto.UINT8, x.shape),
            helper.make_tensor_value_info("s", TensorProto.FLOAT, []),
            helper.make_tensor_value_info("z", TensorProto.UINT8, []),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


def raw(codes):
    return np.frombuffer(numpy_helper.from_array(codes).raw_data, np.uint8)


def check_against_packages(x, scale, zero, codes, scheme, mapping, qmin, qmax):
    """The formulas against the packages' own parameters, tensor by tensor."""
    if mapping == "symmetric":
        amax = np.abs(x).max()
        zp, s = compute_scale_zp(
            np.array(-amax, F), np.array(amax, F), np.array(qmin), np.array(qmax), symmetric=True
        )
        assert F(s) == scale and zp == 0, (scheme, s, scale)
    elif scheme == "uint8" and (scale != 1 or not x.any()):
        y, s, z = dynamic_quantize_linear(x)
        assert s == scale and z == zero and (y == codes).all(), (s, scale, z, zero)


def main():
    here = Path(__file__).parent
    versions = {
        "onnxruntime": ort.__version__,
        "onnx": onnx.__version__,
        "numpy": np.__version__,
        "ml_dtypes": ml_dtypes.__version__,
    }
    for (scheme, mapping), (qmin, qmax, onnx_type, np_type, bits) in SCHEMES.items():
        rng = np.random.default_rng(20 * bits + (mapping == "symmetric") + 7 * (qmin < 0))
        symmetric = mapping == "symmetric"
        tensors, cases = {}, []

        def add(name, x, scale, zero, codes, granularity, group=0, tensors=tensors, cases=cases):
            tensors[f"{name}.x"] = x
            tensors[f"{name}.scales"] = np.ascontiguousarray(scale.reshape(-1))
            tensors[f"{name}.zero_points"] = np.ascontiguousarray(zero.reshape(-1).astype(np.int32))
            tensors[f"{name}.codes"] = raw(codes)
            # Vectors: every row on a byte of its own.
            tensors[f"{name}.codes_by_row"] = np.concatenate(
                [raw(row) for row in np.ascontiguousarray(codes)]
            )
            cases.append(
                {
                    "name": name,
                    "rows": x.shape[0],
                    "k": x.shape[1],
                    "granularity": granularity,
                    "group": group,
                }
            )

        for k in (1, 7, 33, 130):
            rows = hard_rows(k, qmin, qmax, symmetric, rng)
            scale, zero = params(rows, qmin, qmax, symmetric)
            codes = quantize_linear(rows, scale, zero, onnx_type, np_type, axis=0)
            add(f"row{k}", rows, scale, zero, codes, "row")
            if k in (33, 130):
                for i, row in enumerate(rows):
                    x = row[None, :]
                    s, z = scale[i : i + 1], zero[i : i + 1]
                    q = quantize_linear(x, s[0], z[0], onnx_type, np_type)
                    if k == 33:
                        add(f"tensor{i}", x, s, z, q, "tensor")
                    check_against_packages(x, s[0], z[0], q, scheme, mapping, qmin, qmax)
            columns = np.ascontiguousarray(rows[:, ::-1].T)
            codes = quantize_linear(columns, scale, zero, onnx_type, np_type, axis=1)
            add(f"dimension{k}", columns, scale, zero, codes, "dimension")
        # Groups: whole ones, short last ones, odd ones that begin inside a byte.
        for k, group in ((64, 32), (130, 32), (130, 128), (35, 16), (9, 4), (10, 3)):
            rows = hard_rows(k, qmin, qmax, symmetric, rng)
            per_row = -(-k // group)
            scale = np.empty((len(rows), per_row), F)
            zero = np.empty((len(rows), per_row), np.int32)
            for g in range(per_row):
                scale[:, g], zero[:, g] = params(rows[:, g * group : (g + 1) * group], qmin, qmax, symmetric)
            codes = quantize_linear(rows, scale, zero, onnx_type, np_type, axis=1, block=group)
            add(f"group{group}of{k}", rows, scale, zero, codes, "group", group)

        metadata = {
            "scheme": scheme,
            "mapping": mapping,
            "bits": str(bits),
            "cases": json.dumps(cases),
            "written_by": json.dumps(versions),
        }
        path = here / f"{scheme}_{mapping}.safetensors"
        save_file(tensors, path, metadata)
        print(path.name, path.stat().st_size, len(cases))


if __name__ == "__main__":
    main()
