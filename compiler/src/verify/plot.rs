//! Line charts as SVG, without scripts or other files.

use std::fmt::Write;

/// Size of a chart, and the room around its axes, in pixels.
const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 320.0;
const LEFT: f64 = 76.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = 46.0;
/// Colours that differ in lightness too.
const COLOURS: [&str; 6] = ["#1f5fa8", "#c8501e", "#3a8f4d", "#8a4fa3", "#b08a10", "#5c6670"];
/// Most labels along the axis.
const LABELS: usize = 12;

/// A chart of lines over positions 0, 1, 2, ...
pub(super) struct Chart<'a> {
    pub(super) title: &'a str,
    pub(super) x: &'a str,
    pub(super) y: &'a str,
    /// Whether `y` is on a logarithmic scale, which has no place for 0.
    pub(super) logarithmic: bool,
    /// Names of positions; without any they are numbers.
    pub(super) positions: Vec<String>,
    /// Names of lines, and their values; a gap where there is none.
    pub(super) lines: Vec<(String, Vec<Option<f64>>)>,
}

/// Text as XML wants it.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

impl Chart<'_> {
    /// The drawing; empty without a number to draw.
    pub(super) fn svg(&self) -> String {
        let scaled = |v: f64| if self.logarithmic { v.log10() } else { v };
        let drawn = |v: &Option<f64>| v.map(scaled).filter(|v| v.is_finite());
        let all: Vec<f64> = self.lines.iter().flat_map(|(_, values)| values).filter_map(drawn).collect();
        let count = self.lines.iter().map(|(_, values)| values.len()).max().unwrap_or(0);
        let (Some(low), Some(high)) = (all.iter().copied().reduce(f64::min), all.iter().copied().reduce(f64::max)) else {
            return String::new();
        };
        let (low, high, step) = self.range(low, high);
        let at_x = |i: usize| LEFT + (WIDTH - LEFT - RIGHT) * if count > 1 { i as f64 / (count - 1) as f64 } else { 0.5 };
        let at_y = |v: f64| HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (v - low) / (high - low);

        let mut out = format!("<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" xmlns=\"http://www.w3.org/2000/svg\">\n");
        let text = |out: &mut String, x: f64, y: f64, class: &str, s: &str| {
            let _ = writeln!(out, "<text x=\"{x:.1}\" y=\"{y:.1}\" class=\"{class}\">{}</text>", escape(s));
        };
        text(&mut out, LEFT, 18.0, "title", self.title);
        let mut tick = low;
        while tick <= high + step / 2.0 {
            let y = at_y(tick);
            let _ = writeln!(out, "<line x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\" class=\"grid\"/>", WIDTH - RIGHT);
            let label = if self.logarithmic { format!("1e{tick:.0}") } else { short(tick) };
            text(&mut out, LEFT - 6.0, y + 4.0, "tick end", &label);
            tick += step;
        }
        for i in (0..count).step_by(count.div_ceil(LABELS).max(1)) {
            let label = self.positions.get(i).cloned().unwrap_or_else(|| i.to_string());
            text(&mut out, at_x(i), HEIGHT - BOTTOM + 16.0, "tick middle", &label);
        }
        text(&mut out, (LEFT + WIDTH - RIGHT) / 2.0, HEIGHT - 10.0, "tick middle", self.x);
        let _ = writeln!(
            out,
            "<text transform=\"translate(14,{:.1}) rotate(-90)\" class=\"tick middle\">{}</text>",
            HEIGHT / 2.0,
            escape(self.y)
        );
        let mut legend = LEFT + 20.0 + 8.2 * self.title.len() as f64;
        for ((name, values), colour) in self.lines.iter().zip(COLOURS.iter().cycle()) {
            let mut path = String::new();
            let mut gap = true;
            for (i, v) in values.iter().enumerate() {
                let Some(v) = drawn(v) else {
                    gap = true;
                    continue;
                };
                let (x, y) = (at_x(i), at_y(v));
                let _ = write!(path, "{}{x:.1} {y:.1}", if gap { "M" } else { "L" });
                gap = false;
                if count <= 200 {
                    let _ = writeln!(out, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.2\" fill=\"{colour}\"/>");
                }
            }
            let _ = writeln!(out, "<path d=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.6\"/>");
            let _ = writeln!(out, "<rect x=\"{legend:.1}\" y=\"9\" width=\"12\" height=\"4\" fill=\"{colour}\"/>");
            text(&mut out, legend + 16.0, 16.0, "tick", name);
            legend += 34.0 + 6.6 * name.len() as f64;
        }
        out + "</svg>\n"
    }

    /// Lower and upper end of the scale, and the distance of its marks.
    fn range(&self, low: f64, high: f64) -> (f64, f64, f64) {
        if self.logarithmic {
            let (low, high) = (low.floor(), high.ceil());
            let step = ((high - low) / 6.0).ceil().max(1.0);
            return (low, low + ((high - low) / step).ceil().max(1.0) * step, step);
        }
        let (low, high) = (low.min(0.0), if high > low.min(0.0) { high } else { 1.0 });
        // 1, 2 or 5 times a power of 10, so that there are at most six.
        let rough = (high - low) / 5.0;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|s| *s >= rough).unwrap_or(rough);
        ((low / step).floor() * step, (high / step).ceil() * step, step)
    }
}

/// `1.5 M`, `20 k`, `0.3`.
pub(super) fn short(v: f64) -> String {
    let (v, unit) = match v.abs() {
        a if a >= 1e9 => (v / 1e9, " G"),
        a if a >= 1e6 => (v / 1e6, " M"),
        a if a >= 1e3 => (v / 1e3, " k"),
        _ => (v, ""),
    };
    let digits = format!("{v:.3}");
    format!("{}{unit}", digits.trim_end_matches('0').trim_end_matches('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn charts() {
        let chart = Chart {
            title: "a < b",
            x: "layer",
            y: "error",
            logarithmic: true,
            positions: vec!["zero".into(), "one".into(), "two".into()],
            lines: vec![("l".into(), vec![Some(1e-3), Some(0.0), Some(1.0)]), ("m".into(), vec![None; 3])],
        };
        let svg = chart.svg();
        assert!(svg.contains("a &lt; b") && svg.contains(">1e-3<") && svg.contains(">1e0<") && svg.contains(">two<"));
        // From the bottom left; zero is a gap on this scale; then the top right.
        assert!(svg.contains("d=\"M76.0 274.0M944.0 34.0\""), "{svg}");
        assert_eq!(Chart { lines: vec![("none".into(), vec![None])], ..chart }.svg(), "");
    }

    #[test]
    fn scales() {
        let chart = Chart { title: "", x: "", y: "", logarithmic: false, positions: vec![], lines: vec![] };
        assert_eq!(chart.range(3.0, 9.7), (0.0, 10.0, 2.0));
        assert_eq!(chart.range(0.0, 0.0), (0.0, 1.0, 0.2));
        let chart = Chart { logarithmic: true, ..chart };
        assert_eq!(chart.range(-6.5, -6.2), (-7.0, -6.0, 1.0));
        assert_eq!(chart.range(-16.5, -9.2), (-17.0, -9.0, 2.0));
        assert_eq!(chart.range(-6.0, -6.0), (-6.0, -5.0, 1.0));
        assert_eq!([1500.0, 2e6, 0.25, 3e9].map(short), ["1.5 k", "2 M", "0.25", "3 G"]);
    }
}
