//! Element types of the stored weights.

use crate::{Contract, Pass};

/// Gives every weight the element type in which the target stores it. Widening is exact; no target narrows.
pub(crate) const STORAGE: Pass =
    Pass::new("storage", "float weights in the element types that the target stores", Contract::Exact, |target, mut program| {
        program.map_weights(|_, w| if w.dtype.scheme().is_some() { w.clone() } else { w.cast((target.storage)(w)) });
        Ok(program)
    });
