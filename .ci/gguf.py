"""Tiny models of random weights that a real llama-server loads and runs."""

import array
import random
import struct
from pathlib import Path

INTEGER, FLOAT, FLAG, STRING, ARRAY = 4, 6, 7, 8, 9
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
)


def string_bytes(text):
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def field_bytes(name, kind, value):
    """One entry of the header: a string, an integer, a float, or an array of them."""
    if kind == ARRAY:
        inner, items = value
        code = {FLOAT: "<f"}.get(inner, "<i")
        pack = string_bytes if inner == STRING else lambda n: struct.pack(code, n)
        body = struct.pack("<IQ", inner, len(items)) + b"".join(map(pack, items))
    elif kind == STRING:
        body = string_bytes(value)
    elif kind == FLAG:
        body = struct.pack("<?", value)
    else:
        body = struct.pack("<f" if kind == FLOAT else "<I", value)
    return string_bytes(name) + struct.pack("<I", kind) + body


def header_fields(width, layers):
    """The header of a Llama with one token for each byte and letter."""
    letters = [bytes([code]) for code in range(97, 123)]
    tokens = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % code for code in range(256))]
    tokens += [b"\xe2\x96\x81" + letter for letter in letters] + letters
    kinds = [2, 3, 3] + [6] * 256 + [1] * 52
    sizes = {
        "context_length": 4096, "embedding_length": width, "block_count": layers,
        "feed_forward_length": 4 * width, "attention.head_count": 4,
        "attention.head_count_kv": 4, "rope.dimension_count": width // 4,
        "vocab_size": len(tokens),
    }
    scores = [0.0] * len(tokens)
    fields = [
        ("general.architecture", STRING, "llama"),
        *((f"llama.{name}", INTEGER, size) for name, size in sizes.items()),
        ("llama.attention.layer_norm_rms_epsilon", FLOAT, 1e-5),
        ("tokenizer.ggml.model", STRING, "llama"),
        ("tokenizer.ggml.tokens", ARRAY, (STRING, tokens)),
        ("tokenizer.ggml.scores", ARRAY, (FLOAT, scores)),
        ("tokenizer.ggml.token_type", ARRAY, (5, kinds)),
        ("tokenizer.ggml.bos_token_id", INTEGER, 1),
        ("tokenizer.ggml.eos_token_id", INTEGER, 2),
        ("tokenizer.chat_template", STRING, TEMPLATE),
    ]
    return [field_bytes(*field) for field in fields], len(tokens)


def tensor_shapes(width, layers, tokens):
    """(name, shape) of each tensor."""
    yield "token_embd.weight", (width, tokens)
    wide = 4 * width
    parts = {
        "attn_norm": (width,), "attn_q": (width, width), "attn_k": (width, width),
        "attn_v": (width, width), "attn_output": (width, width), "ffn_norm": (width,),
        "ffn_gate": (width, wide), "ffn_up": (width, wide), "ffn_down": (wide, width),
    }
    for layer in range(layers):
        for part, shape in parts.items():
            yield f"blk.{layer}.{part}.weight", shape
    yield "output_norm.weight", (width,)
    yield "output.weight", (width, tokens)


def write_model(path, width=64, layers=2, seed=0):
    """Write a model of random weights that a real llama-server loads and runs."""
    fields, tokens = header_fields(width, layers)
    chance = random.Random(seed)
    noise = array.array("f", (chance.gauss(0, 0.05) for _ in range(1 << 14)))
    infos, bodies, offset = [], [], 0
    for name, shape in tensor_shapes(width, layers, tokens):
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        dimensions = b"".join(struct.pack("<Q", n) for n in shape)
        place = struct.pack("<IQ", 0, offset)
        infos.append(
            string_bytes(name) + struct.pack("<I", len(shape)) + dimensions + place
        )
        values = noise * (count // len(noise) + 1)
        values = array.array("f", [1.0]) * count if "norm" in name else values[:count]
        bodies.append(values.tobytes() + bytes(-count * 4 % 32))
        offset += len(bodies[-1])
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(fields))
    head += b"".join(fields) + b"".join(infos)
    Path(path).write_bytes(head + bytes(-len(head) % 32) + b"".join(bodies))
    return path
