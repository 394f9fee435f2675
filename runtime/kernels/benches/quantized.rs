//! Products with quantized weights of a shape of Qwen2-VL-2B: one row over more weights than caches hold, and many rows:
//! `cargo bench -p vlmc-kernels --bench quantized`, of some schemes only with `-- int4g32`.
#![allow(missing_docs, clippy::print_stdout)]

use std::time::Instant;
use vlmc_artifact::{Scheme, quant::panel_bytes};
use vlmc_kernels::{Floats, Kernels, Panels};

/// Median seconds of 5 calls.
fn median(mut f: impl FnMut()) -> f64 {
    let mut times = [0.0; 5];
    for t in &mut times {
        let start = Instant::now();
        f();
        *t = start.elapsed().as_secs_f64();
    }
    times.sort_by(f64::total_cmp);
    times[2]
}

fn main() {
    let (n, k) = (1536, 8960);
    let only: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    println!("{:?}", Kernels::new(1).isa());
    println!("{:>8} {:>7} {:>7} | {:>9} | {:>12} {:>12}", "scheme", "dynamic", "threads", "m=1 GB/s", "m=16 GOP/s", "m=512 GOP/s");
    for (name, dynamic) in [("int4g32", true), ("int4g32z", true), ("int4g128", true), ("int8", true), ("int4g32", false), ("int8", false)]
    {
        if !only.is_empty() && !only.iter().any(|o| o == name) {
            continue;
        }
        let scheme: Scheme = name.parse().expect("a scheme");
        let bytes = n / 16 * panel_bytes(scheme, k).expect("a size");
        let copies = (900 << 20) / bytes;
        // Small scales and any codes: 0x1111 is half of 0.0007.
        let weights = vec![0x11u8; copies * bytes];
        let matrix = |i: usize| Panels::new(Floats::Quant(&weights[i * bytes..(i + 1) * bytes], scheme), n, k).expect("fits");
        for threads in [1, cores] {
            let kernels = Kernels::new(threads);
            let x: Vec<f32> = (0..512 * k).map(|i| (i % 127) as f32 / 127.0 - 0.5).collect();
            let mut out = vec![0.0; 512 * n];
            let pass = median(|| (0..copies).for_each(|i| kernels.linear(&x[..k], &matrix(i), None, None, dynamic, &mut out[..n])));
            let rows = [16, 512].map(|m| {
                let seconds = median(|| kernels.linear(&x[..m * k], &matrix(0), None, None, dynamic, &mut out[..m * n]));
                2e-9 * (m * n * k) as f64 / seconds
            });
            println!(
                "{name:>8} {dynamic:>7} {threads:>7} | {:>9.1} | {:>12.0} {:>12.0}",
                1e-9 * (copies * bytes) as f64 / pass,
                rows[0],
                rows[1]
            );
        }
    }
}
