//! CPU kernels of the vlmc runtime: what the steps of a compiled program
//! ([`vlmc_artifact::program::Kernel`]) compute.
//!
//! All take slices and check their lengths, so that nothing can be read or written out of bounds. Each is written once over
//! [`lanes::Lanes`], 16 floats at a time, and compiled for AVX-512, AVX2 and no SIMD at all; the best that the CPU has is
//! chosen once ([`Isa::detect`]). A result does not depend on the number of threads: work is split over rows and panels of
//! the output only.

// SIMD needs it. Everywhere else in the project it is denied.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
mod elementwise;
mod few;
#[cfg(target_arch = "x86_64")]
mod flash;
mod ints;
pub mod isa;
mod lanes;
mod linear;
mod moe;
pub mod moves;
mod norm;
mod pool;
mod probe;
mod quantize;
mod quantized;
mod round;

pub use attention::{Attention, Heads, Kept, Seen, Strides, attention_scratch, packed_attention_scratch, side_by_side};
pub use elementwise::Broadcast;
pub use isa::Isa;
pub use linear::{BadIndex, Floats, Panels, Rows, Table, pack_panels};
pub use moe::{Experts, Moe, moe_scratch};
pub use norm::Norm;
pub use pool::Pool;
pub use probe::Arithmetic;
pub use quantize::quantize;
pub use quantized::Rounded;
use std::sync::{Mutex, PoisonError};

/// The kernels of one CPU: an instruction set and a pool of threads.
pub struct Kernels {
    isa: Isa,
    pool: Pool,
    /// Rounded or packed operands of a product, kept from one to the next.
    scratch: Mutex<Vec<i32>>,
}

impl Kernels {
    /// With the best instruction set that this CPU has.
    pub fn new(threads: usize) -> Self {
        Self { isa: Isa::detect(), pool: Pool::new(threads), scratch: Mutex::default() }
    }

    /// With a given instruction set; `None` if this CPU lacks it.
    pub fn with_isa(threads: usize, isa: Isa) -> Option<Self> {
        isa.is_supported().then(|| Self { isa, pool: Pool::new(threads), scratch: Mutex::default() })
    }

    /// Memory to work in, until [`Self::give_scratch`].
    fn take_scratch(&self) -> Vec<i32> {
        std::mem::take(&mut *self.scratch.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn give_scratch(&self, words: Vec<i32>) {
        *self.scratch.lock().unwrap_or_else(PoisonError::into_inner) = words;
    }

    /// The instruction set.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The threads.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }
}

/// An operand that may be what the result's buffer holds.
#[derive(Clone, Copy)]
pub enum Src<'a, T> {
    /// Elsewhere.
    Slice(&'a [T]),
    /// In the result's buffer.
    InPlace,
}
