//! What a pass did.

use std::{collections::BTreeMap, fmt};

/// A place where a rule matched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Graph name.
    pub graph: String,
    /// Scope of the expression's last node.
    pub scope: String,
    /// Why the rule refused; `None` if it fired.
    pub refused: Option<String>,
}

/// What a pass did to a program. Prints in a few lines, layers folded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// Pass name.
    pub pass: &'static str,
    /// Nodes of all graphs before and after.
    pub nodes: [usize; 2],
    /// Where its rule matched, in order.
    pub events: Vec<Event>,
}

/// `model.layers.{i}` for `model.layers.3`.
fn folded(scope: &str) -> String {
    let part = |p: &str| if !p.is_empty() && p.bytes().all(|b| b.is_ascii_digit()) { "{i}".to_string() } else { p.to_string() };
    scope.split('.').map(part).collect::<Vec<_>>().join(".")
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [before, after] = self.nodes;
        writeln!(f, "{}: {before} nodes -> {after}", self.pass)?;
        let mut counts: BTreeMap<_, usize> = BTreeMap::new();
        for e in &self.events {
            let place = if e.scope.is_empty() { e.graph.clone() } else { format!("{}: {}", e.graph, folded(&e.scope)) };
            *counts.entry((place, &e.refused)).or_default() += 1;
        }
        counts.iter().try_for_each(|((place, refused), count)| match refused {
            None => writeln!(f, "  fired {count} x  {place}"),
            Some(why) => writeln!(f, "  refused {count} x  {place}: {why}"),
        })
    }
}
