//! Element types of the stored weights.

use crate::{Contract, Pass};

/// Gives every weight the element type in which the target stores it. Widening is exact; no target narrows.
pub(crate) const STORAGE: Pass =
    Pass::new("storage", "weights in the element types that the target stores", Contract::Exact, |target, mut program| {
        program.map_weights(|_, w| w.cast((target.storage)(w)));
        Ok(program)
    });
