//! Sizes and durations, as people write and read them.

use std::time::Duration;

const BYTE_UNITS: [(&str, u32); 5] = [("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40), ("PiB", 50)];

/// `8GiB`, `8G`, `8 gib` (powers of 1024), `8GB` (powers of 1000), or a plain number of bytes.
pub(super) fn parse_bytes(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text)?;
    let factor = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kib" => 1024f64.powi(1),
        "m" | "mib" => 1024f64.powi(2),
        "g" | "gib" => 1024f64.powi(3),
        "t" | "tib" => 1024f64.powi(4),
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        _ => return Err(format!("{unit:?} is no unit of size; write 512MiB or 8GiB")),
    };
    let bytes = (number * factor).round();
    // 2^63 is exact in f64, and more than any memory.
    if bytes < 9_223_372_036_854_775_808.0 { Ok(bytes as u64) } else { Err(format!("{text} is too large")) }
}

/// `500ms`, `60s`, `5m`, `2h`, `1d`, or a plain number of seconds.
pub(super) fn parse_duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = split(text)?;
    let seconds = match unit {
        "ms" => number / 1e3,
        "" | "s" | "sec" => number,
        "m" | "min" => number * 60.0,
        "h" => number * 3600.0,
        "d" => number * 86400.0,
        _ => return Err(format!("{unit:?} is no unit of time; write 500ms, 60s, 5m or 2h")),
    };
    Duration::try_from_secs_f64(seconds).map_err(|_| format!("{text} is too long"))
}

fn split(text: &str) -> Result<(f64, &str), String> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let number = number.parse().map_err(|_| format!("{text:?} does not begin with a number"))?;
    Ok((number, unit.trim_start()))
}

/// Three digits and a unit: `512 B`, `1.50 KiB`, `90.9 MiB`.
pub(super) fn bytes(bytes: u64) -> String {
    let unit = BYTE_UNITS.iter().rev().find(|(_, power)| bytes >> power > 0);
    match unit {
        None => format!("{bytes} B"),
        Some((unit, power)) => {
            let value = bytes as f64
                / f64::from(1u32 << (power % 30))
                / if *power >= 30 { 1024f64.powi(3) } else { 1.0 };
            let digits = if value < 9.995 { 2 } else { usize::from(value < 99.95) };
            format!("{value:.digits$} {unit}")
        }
    }
}

/// The largest unit that leaves at least 1: `12 s`, `3 min`, `5 h`, `2 d`.
pub(super) fn age(seconds: f64) -> String {
    match seconds.max(0.0) {
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s if s < 172_800.0 => format!("{:.0} h", s / 3600.0),
        s => format!("{:.0} d", s / 86400.0),
    }
}

/// Digits in groups of three: `1,234,567`.
pub(super) fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `1 layer`, `2 layers`.
pub(super) fn plural(n: u64, what: &str) -> String {
    let s = if n == 1 { "" } else { "s" };
    format!("{} {what}{s}", count(n))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_understood() {
        for (text, bytes) in [
            ("8GiB", 8 << 30),
            ("8G", 8 << 30),
            (" 1.5 mib ", 3 << 19),
            ("2GB", 2_000_000_000),
            ("4096", 4096),
            ("0", 0),
            ("64KiB", 65_536),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for text in ["", "GiB", "8 gallons", "-1", "1.2.3", "99999999T"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations_are_understood() {
        for (text, ms) in
            [("500ms", 500), ("60s", 60_000), ("1.5", 1_500), ("5m", 300_000), ("2h", 7_200_000), ("0s", 0)]
        {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "s", "5 weeks", "-1s"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_written_with_three_digits() {
        for (n, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (1536, "1.50 KiB"),
            (95_300_000, "90.9 MiB"),
            (8 << 30, "8.00 GiB"),
            (300 << 30, "300 GiB"),
            (3 << 40, "3.00 TiB"),
            (u64::MAX, "16384 PiB"),
        ] {
            assert_eq!(bytes(n), text);
        }
    }

    #[test]
    fn ages_and_counts_are_written() {
        assert_eq!(
            [age(0.25), age(12.3), age(180.0), age(18_000.0), age(200_000.0)],
            ["0 s", "12 s", "3 min", "5 h", "2 d"]
        );
        assert_eq!([plural(1, "layer"), plural(0, "row")], ["1 layer", "0 rows"]);
        assert_eq!([count(0), count(999), count(1000), count(1_234_567)], ["0", "999", "1,000", "1,234,567"]);
    }
}
