//! Choice of the instruction set.

use crate::{
    ints::{Ints, ScalarInts},
    lanes::{Lanes, Scalar},
};

/// An instruction set that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// Plain Rust: the reference for the others.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// The same and AVX-VNNI.
    AvxVnni,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// The same and AVX-512 VNNI.
    Avx512Vnni,
    /// The same and AVX-512 BF16.
    Avx512Bf16,
    /// The same and AMX for bytes and bf16.
    Amx,
}

/// A computation over lanes.
pub(crate) trait Task {
    type Out;

    /// # Safety
    /// The CPU has the instruction set of `L`.
    unsafe fn run<L: Lanes>(self) -> Self::Out;
}

/// A computation over integers and floats.
pub(crate) trait IntTask {
    /// # Safety
    /// The CPU has the instruction set of `I`.
    unsafe fn run<I: Ints>(self);
}

impl Isa {
    /// All, the plainest first.
    pub const ALL: [Self; 7] = [Self::Scalar, Self::Avx2, Self::AvxVnni, Self::Avx512, Self::Avx512Vnni, Self::Avx512Bf16, Self::Amx];

    /// The best that this CPU has.
    pub fn detect() -> Self {
        Self::ALL.into_iter().rev().find(|isa| isa.is_supported()).unwrap_or(Self::Scalar)
    }

    /// Whether this CPU has it.
    pub fn is_supported(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c"),
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => is_x86_feature_detected!("avxvnni") && Self::Avx2.is_supported(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && Self::Avx2.is_supported()
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => is_x86_feature_detected!("avx512vnni") && Self::Avx512.is_supported(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => is_x86_feature_detected!("avx512bf16") && Self::Avx512Vnni.is_supported(),
            #[cfg(target_arch = "x86_64")]
            Self::Amx => Self::Avx512Bf16.is_supported() && crate::amx::is_supported(),
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// Runs `task` compiled for this instruction set. [`crate::Kernels`] holds only supported ones.
    #[inline]
    pub(crate) fn run<T: Task>(self, task: T) -> T::Out {
        match self {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Kernels` is made only with an instruction set that `is_supported` has found.
            Self::Avx512 | Self::Avx512Vnni | Self::Avx512Bf16 | Self::Amx => unsafe { avx512(task) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Self::Avx2 | Self::AvxVnni => unsafe { avx2(task) },
            // SAFETY: needs nothing.
            _ => unsafe { task.run::<Scalar>() },
        }
    }

    /// As [`Self::run`].
    #[inline]
    pub(crate) fn run_ints(self, task: impl IntTask) {
        match self {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above, for all.
            Self::Avx512Vnni | Self::Avx512Bf16 | Self::Amx => unsafe { ints_avx512_vnni(task) },
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { ints_avx512(task) },
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => unsafe { ints_avx_vnni(task) },
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { ints_avx2(task) },
            _ => unsafe { task.run::<ScalarInts>() },
        }
    }
}

/// # Safety
/// The CPU has AVX-512 F, BW, DQ, VL, AVX2, FMA and F16C.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn avx512<T: Task>(task: T) -> T::Out {
    // SAFETY: the caller's promise.
    unsafe { task.run::<crate::lanes::Avx512>() }
}

/// # Safety
/// The CPU has AVX2, FMA and F16C.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2<T: Task>(task: T) -> T::Out {
    // SAFETY: the caller's promise.
    unsafe { task.run::<crate::lanes::Avx2>() }
}

/// # Safety
/// The CPU has AVX-512 F, BW, DQ, VL and VNNI, AVX2, FMA and F16C.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn ints_avx512_vnni(task: impl IntTask) {
    // SAFETY: the caller's promise.
    unsafe { task.run::<crate::ints::Ints512<true>>() }
}

/// # Safety
/// The CPU has AVX-512 F, BW, DQ, VL, AVX2, FMA and F16C.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn ints_avx512(task: impl IntTask) {
    // SAFETY: the caller's promise.
    unsafe { task.run::<crate::ints::Ints512<false>>() }
}

/// # Safety
/// The CPU has AVX-VNNI, AVX2, FMA and F16C.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avxvnni,avx2,fma,f16c")]
unsafe fn ints_avx_vnni(task: impl IntTask) {
    // SAFETY: the caller's promise.
    unsafe { task.run::<crate::ints::Ints256<true>>() }
}

/// # Safety
/// The CPU has AVX2, FMA and F16C.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn ints_avx2(task: impl IntTask) {
    // SAFETY: the caller's promise.
    unsafe { task.run::<crate::ints::Ints256<false>>() }
}
