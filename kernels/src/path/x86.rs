//! The x86-64 paths: the portable loops compiled for AVX2 and for AVX-512.

use crate::path::Kernels;

/// What this CPU can run, slowest first.
pub(super) fn detected() -> Vec<&'static Kernels> {
    let mut found: Vec<&'static Kernels> = Vec::new();
    if is_x86_feature_detected!("avx2") {
        found.push(&avx2::KERNELS);
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
        {
            found.push(&avx512::KERNELS);
        }
    }
    found
}

mod avx2 {
    crate::path::versions!("avx2");

    pub(super) static KERNELS: Kernels = Kernels {
        name: "avx2",
        load,
        range,
        encode,
        encode_columns,
        merge_columns,
        decode,
        decode_columns,
        pack,
        unpack,
    };
}

mod avx512 {
    crate::path::versions!("avx2,avx512f,avx512bw,avx512vl,avx512dq");

    pub(super) static KERNELS: Kernels = Kernels {
        name: "avx512",
        load,
        range,
        encode,
        encode_columns,
        merge_columns,
        decode,
        decode_columns,
        pack,
        unpack,
    };
}
