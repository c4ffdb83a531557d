"""The INT6 format, value by value in plain Python: slow, and written from its description alone.

python tests/int6_reference.py     writes tests/int6_vectors.json
"""

import json
import random
import struct
from pathlib import Path

VECTORS = Path(__file__).with_name("int6_vectors.json")


def float32(value: float) -> float:
    """`value` rounded to float32."""
    return struct.unpack("f", struct.pack("f", value))[0]


def pruned(row: list[float]) -> list[float]:
    """Two pairs of largest energy in every chunk of 8; of equals the first."""
    result = [0.0] * len(row)
    for chunk in range(0, len(row), 8):
        energies = [float32(float32(row[chunk + 2 * p] ** 2) + float32(row[chunk + 2 * p + 1] ** 2)) for p in range(4)]
        for p in sorted(range(4), key=lambda p: (-energies[p], p))[:2]:
            result[chunk + 2 * p : chunk + 2 * p + 2] = row[chunk + 2 * p : chunk + 2 * p + 2]
    return result


def quantized(row: list[float]) -> tuple[list[int], float]:
    """(codes, scale fitted by least squares) of a pruned row."""
    scale = float32(max(max(map(abs, row)), float32(1e-6)) / 31)
    q = []
    for w in row:
        code = max(-32, min(31, round(float32(w / scale))))  # Python rounds halves to even, too
        q.append(code if code or not w else (1 if w > 0 else -1))
    fitted = abs(sum(c * w for c, w in zip(q, row, strict=True)) / max(sum(c * c for c in q), 1e-6))
    return q, max(fitted, 1e-6)


def encodable(q: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """(codes the format can hold, kept pairs of every chunk)."""
    result, kept_pairs = [0] * len(q), []
    for chunk in range(0, len(q), 8):
        pairs = [q[chunk + 2 * p : chunk + 2 * p + 2] for p in range(4)]
        kept = [p for p in range(4) if any(pairs[p])][:2]
        kept += [p for p in range(4) if p not in kept][: 2 - len(kept)]
        kept.sort()
        for p in kept:
            a, b = pairs[p]
            if not a and not b:
                a, b = 1, 1
            a = a or (1 if b > 0 else -1)
            b = b or (1 if a > 0 else -1)
            result[chunk + 2 * p : chunk + 2 * p + 2] = [a, b]
        kept_pairs.append((kept[0], kept[1]))
    return result, kept_pairs


def encoded(weight: list[list[float]]) -> dict:
    """Payload, metadata, scales and codes of a weight (rows of equally many float32 values)."""
    payload, metadata, scales, codes = bytearray(), [], [], []
    for row in weight:
        padded = row + [0.0] * (-len(row) % 64)
        q, scale = quantized(pruned(padded))
        q, kept_pairs = encodable(q)
        for chunk, (p0, p1) in enumerate(kept_pairs):
            word = 0
            for i, column in enumerate([2 * p0, 2 * p0 + 1, 2 * p1, 2 * p1 + 1]):
                word |= (q[8 * chunk + column] & 63) << 6 * i
            payload += word.to_bytes(3, "little")
            if chunk % 8 == 0:
                metadata.append(0)
            metadata[-1] |= (p0 | p1 << 2) << 4 * (chunk % 8)
        scales.append(scale)
        codes.append(q)
    return {"payload": payload.hex(), "metadata": metadata, "scales": scales, "codes": codes}


def cases() -> dict[str, list[list[float]]]:
    """Small weights with what the format treats specially in them."""
    draw = random.Random(0)

    def normal(rows: int, columns: int) -> list[list[float]]:
        return [[float32(draw.gauss(0, 1)) for _ in range(columns)] for _ in range(rows)]

    ties = [[float32((-1) ** (i // 3) * (1 + i % 2)) for i in range(64)]]
    zeros = [[0.0] * 64, *normal(1, 64)]
    one_value = [[1.5 if i in (3, 12, 13) else 0.0 for i in range(64)]]
    outlier = normal(1, 64)
    outlier[0][5] = 100.0  # almost all others round to 0, and must not
    return {
        "normal": normal(3, 128),
        "padded": normal(2, 70),
        "one_column": normal(2, 1),
        "ties": ties,
        "zero_row": zeros,
        "empty_chunks": one_value,
        "outlier": outlier,
    }


if __name__ == "__main__":
    vectors = {name: {"weight": weight, **encoded(weight)} for name, weight in cases().items()}
    VECTORS.write_text(json.dumps(vectors) + "\n", encoding="utf-8")
