//! Products of the shapes of Qwen2-VL-2B beside the `gemm` crate in the same run: `cargo bench -p vlmc-kernels`.
#![allow(missing_docs, clippy::print_stdout)]

use std::time::Instant;
use vlmc_kernels::{Floats, Kernels, Panels, pack_panels};

/// Median seconds of a call, of at least 5 calls and half a second.
fn median(mut f: impl FnMut()) -> f64 {
    f();
    let mut times = vec![];
    let begin = Instant::now();
    while times.len() < 5 || begin.elapsed().as_secs_f64() < 0.5 {
        let start = Instant::now();
        f();
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let kernels = Kernels::new(threads);
    println!("{threads} threads, {:?}", kernels.isa());
    println!(
        "{:>5} {:>6} {:>6} | {:>9} {:>7} | {:>9} {:>7} | {:>9} | {:>12} {:>13}",
        "m", "n", "k", "f32 GF/s", "GB/s", "bf16 GF/s", "GB/s", "gemm GF/s", "f32 vs gemm", "bf16 vs gemm"
    );
    for (n, k) in [(8960, 1536), (1536, 8960)] {
        let w: Vec<f32> = (0..n * k).map(|i| (i % 251) as f32 / 251.0 - 0.5).collect();
        let w16: Vec<half::bf16> = w.iter().map(|v| half::bf16::from_f32(*v)).collect();
        let (p, p16) = (pack_panels(&w, n, k), pack_panels(&w16, n, k));
        let (p, p16) = (Panels::new(Floats::F32(&p), n, k).expect("fits"), Panels::new(Floats::BF16(&p16), n, k).expect("fits"));
        for m in [1, 16, 256] {
            let x: Vec<f32> = (0..m * k).map(|i| (i % 127) as f32 / 127.0 - 0.5).collect();
            let mut out = vec![0.0; m * n];
            let ours = median(|| kernels.linear(&x, &p, None, None, false, &mut out));
            let ours16 = median(|| kernels.linear(&x, &p16, None, None, false, &mut out));
            // SAFETY: pointers and strides are those of x [m, k], wᵀ [k, n] and out [m, n].
            #[allow(unsafe_code)]
            let theirs = median(|| unsafe {
                gemm::gemm(
                    m,
                    n,
                    k,
                    out.as_mut_ptr(),
                    1,
                    n as isize,
                    false,
                    x.as_ptr(),
                    1,
                    k as isize,
                    w.as_ptr(),
                    k as isize,
                    1,
                    0.0,
                    1.0,
                    false,
                    false,
                    false,
                    gemm::Parallelism::Rayon(threads),
                );
            });
            let flops = 2e-9 * (m * n * k) as f64;
            let bytes = 1e-9 * (n * k) as f64;
            println!(
                "{m:>5} {n:>6} {k:>6} | {:>9.1} {:>7.1} | {:>9.1} {:>7.1} | {:>9.1} | {:>11.2}x {:>12.2}x",
                flops / ours,
                4.0 * bytes / ours,
                flops / ours16,
                2.0 * bytes / ours16,
                flops / theirs,
                theirs / ours,
                theirs / ours16
            );
        }
    }
}
