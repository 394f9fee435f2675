//! Attention of Qwen2-VL-2B, a prompt's and a picture's: `cargo bench -p vlmc-kernels --bench attention`.
#![allow(missing_docs, clippy::print_stdout)]

use std::time::Instant;
use vlmc_kernels::{Attention, Heads, Isa, Kept, Kernels, Seen, attention_scratch};

fn main() {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    println!("{:>10} {:>7} {:>5} {:>20} | {:>9}", "isa", "threads", "bf16", "heads x s x t x d", "GOP/s");
    for (heads, kv_heads, s, t, d, causal) in [(12, 2, 512, 512, 128, true), (12, 2, 1, 4096, 128, true), (16, 16, 1024, 1024, 80, false)] {
        let floats = |n: usize| (0..n).map(|i| (i * 7 % 255) as f32 / 128.0 - 1.0).collect::<Vec<_>>();
        let (q, k, v) = (floats(heads * s * d), floats(kv_heads * t * d), floats(kv_heads * t * d));
        let mask = vec![1; t];
        let seen = if causal { Seen::Causal(&mask) } else { Seen::All };
        let keys = |data| Heads::new(Kept::F32(data), kv_heads, t);
        for (isa, threads, bf16) in Isa::ALL.into_iter().flat_map(|i| [(i, 1, false), (i, 1, true), (i, cores, true)]) {
            let Some(kernels) = Kernels::with_isa(threads, isa) else { continue };
            let a = Attention {
                q: Heads::new(&q[..], heads, s),
                k: keys(&k),
                v: keys(&v),
                lead: 1,
                heads,
                kv_heads,
                s,
                t,
                d,
                dv: d,
                scale: 0.1,
                seen,
                rotary: None,
                packed: false,
                bf16,
            };
            let (mut scratch, mut out) = (vec![0.0; threads * attention_scratch(heads / kv_heads, s, t, d, d)], vec![0.0; heads * s * d]);
            let mut seconds = f64::INFINITY;
            for _ in 0..5 {
                let start = Instant::now();
                kernels.attention(&a, &mut scratch, &mut out);
                seconds = seconds.min(start.elapsed().as_secs_f64());
            }
            let pairs = if causal { s * (t - s) + s * (s + 1) / 2 } else { s * t };
            let shape = format!("{heads}x{s}x{t}x{d}");
            println!(
                "{:>10} {threads:>7} {bf16:>5} {shape:>20} | {:>9.1}",
                format!("{isa:?}"),
                4e-9 * (heads * pairs * d) as f64 / seconds
            );
        }
    }
}
