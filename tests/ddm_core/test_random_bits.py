import numpy as np

from ddm_core.random_bits import Stream, splitmix64_finalize


def test_stream_ids_are_distinct_for_300_experts():
    fixed = [int(stream) for stream in Stream.__members__.values() if stream is not Stream.EXPERT_SAMPLES]
    ids = [*fixed, *(Stream.EXPERT_SAMPLES + k for k in range(300))]
    assert len(Stream.__members__) == len(fixed) + 1
    assert len(set(ids)) == len(ids)


def test_stream_ids_never_change():
    assert {stream.name: stream.value for stream in Stream} == {
        "EPOCH_ORDER": 0,
        "TRAINING_NOISE": 1,
        "TRAINING_STEP": 2,
        "SCORE_IDENTITY": 7,
        "CONSISTENCY": 8,
        "BUCKET_ORDER": 9,
        "FLIP": 10,
        "HELD_OUT_NOISE": 11,
        "TAR_ORDER": 12,
        "BLOCK_ORDER": 13,
        "MEAN_FLOW": 14,
        "SPEEDUP": 15,
        "ROW_NOISE": 16,
        "EXPERT_SAMPLES": 1000,
    }


def test_splitmix64_finalize_is_one_to_one_on_small_numbers():
    bits = np.arange(10_000, dtype=np.uint64)
    assert len(np.unique(splitmix64_finalize(bits))) == len(bits)
