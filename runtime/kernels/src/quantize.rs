//! Codes of weights, found at the speed of the CPU.

use crate::{Isa, isa::Task, lanes::Lanes};
use vlmc_artifact::{
    Scheme,
    quant::{Codes, Method},
};

struct Quantize<'a> {
    rows: &'a [f32],
    k: usize,
    scheme: Scheme,
    method: Method,
}

impl Task for Quantize<'_> {
    type Out = Codes;

    // The definition itself, which compilers vectorise well; being the same operations in the same order, every instruction
    // set gives the same bytes.
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) -> Codes {
        Codes::of(self.rows, self.k, self.scheme, self.method)
    }
}

/// Quantizes rows of `k` columns: [`Codes::of`], on an instruction set that this CPU has.
///
/// # Panics
/// If it has not.
pub fn quantize(isa: Isa, rows: &[f32], k: usize, scheme: Scheme, method: Method) -> Codes {
    assert!(isa.is_supported(), "{isa:?} is not there");
    isa.run(Quantize { rows, k, scheme, method })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn all_instruction_sets_choose_alike(
            x in prop::collection::vec(-3f32..3.0, 1..300), k in 1usize..100, scheme in 0usize..6, search: bool,
        ) {
            let scheme: Scheme = ["int4g32", "int4g16z", "int8", "int8g64", "int4", "int8z"][scheme].parse().unwrap();
            let method = if search { Method::Search } else { Method::Round };
            let x = &x[..x.len() / k * k];
            let plain = Codes::of(x, k, scheme, method);
            for isa in Isa::ALL.into_iter().filter(|isa| isa.is_supported()) {
                prop_assert_eq!(&quantize(isa, x, k, scheme, method), &plain);
            }
        }
    }
}
