//! The x86-64 paths: the portable loops compiled for AVX2 and for AVX-512, and runs of groups and columns by hand.

use crate::path::Kernels;

mod avx2;
mod avx512;

/// What this CPU can run, slowest first.
pub(super) fn detected() -> Vec<&'static Kernels> {
    let mut found: Vec<&'static Kernels> = Vec::new();
    if is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("f16c")
        && is_x86_feature_detected!("popcnt")
    {
        found.push(&loops_avx2::KERNELS);
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
        {
            found.push(&loops_avx512::KERNELS);
        }
    }
    found
}

mod loops_avx2 {
    crate::path::versions!("avx2,f16c,popcnt");

    pub(super) static KERNELS: Kernels = Kernels {
        name: "avx2",
        streams: true,
        hand: Some(&super::avx2::HAND),
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

mod loops_avx512 {
    crate::path::versions!("avx2,avx512f,avx512bw,avx512vl,avx512dq,f16c,popcnt");

    pub(super) static KERNELS: Kernels = Kernels {
        name: "avx512",
        streams: true,
        hand: Some(&super::avx512::HAND),
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
