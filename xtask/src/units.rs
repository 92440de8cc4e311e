//! Sizes, numbers and durations as people write and read them.
//!
//! Pure. Sizes are bytes; suffixes are binary, as in QEMU's and Linux's own options.

use std::time::Duration;

/// A size in bytes: a decimal number with an optional suffix K, M, G or T (powers of 1024, either case).
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is no size; write a number with an optional K, M, G or T, such as 256M");
    let shift = match text.bytes().last().map(|byte| byte.to_ascii_uppercase()) {
        Some(b'K') => 10,
        Some(b'M') => 20,
        Some(b'G') => 30,
        Some(b'T') => 40,
        _ => 0,
    };
    let digits = if shift == 0 { text } else { &text[..text.len() - 1] };
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(wrong());
    }
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).filter(|&size| size > 0).ok_or_else(wrong)
}

/// A duration given in seconds, fractions allowed.
pub(crate) fn parse_seconds(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is no number of seconds");
    let seconds: f64 = text.parse().map_err(|_| wrong())?;
    if seconds > 0.0 { Duration::try_from_secs_f64(seconds).map_err(|_| wrong()) } else { Err(wrong()) }
}

/// A count with its thousands parted: `1,234,567`.
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A size in the largest unit that leaves it exact or at least 10: `1 GiB`, `1536 MiB`, `12 KiB`.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    for (name, shift) in UNITS {
        if bytes >= 10 << shift || (bytes >> shift > 0 && bytes.trailing_zeros() >= shift) {
            return format!("{} {name}", count(bytes >> shift));
        }
    }
    format!("{} bytes", count(bytes))
}

/// A duration in seconds, or in minutes from two minutes on.
pub(crate) fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    if seconds >= 120 {
        format!("{} min {:02} s", seconds / 60, seconds % 60)
    } else {
        format!("{:.1} s", time.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_binary_suffixes() {
        for (text, bytes) in
            [("1G", 1 << 30), ("256m", 256 << 20), ("12K", 12 << 10), ("4096", 4096), ("2T", 2 << 40)]
        {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "G", "-1G", "+1G", "1.5G", "1 G", "1GB", "0", "0K", "0x10M", "99999999999999T", "1é"]
        {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn seconds_are_positive_and_finite() {
        assert_eq!(parse_seconds("1.5"), Ok(Duration::from_millis(1500)));
        for text in ["0", "-1", "inf", "nan", "x", "1e300"] {
            assert!(parse_seconds(text).is_err(), "{text}");
        }
    }

    #[test]
    fn numbers_are_parted_by_thousands() {
        for (number, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(count(number), text);
        }
    }

    #[test]
    fn sizes_are_written_in_their_natural_unit() {
        for (bytes, text) in [
            (1 << 30, "1 GiB"),
            (1536 << 20, "1,536 MiB"),
            (4096, "4 KiB"),
            (100, "100 bytes"),
            (1025, "1,025 bytes"),
            (20_000, "19 KiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn durations_change_unit_at_two_minutes() {
        assert_eq!(duration(Duration::from_millis(1250)), "1.2 s");
        assert_eq!(duration(Duration::from_secs(119)), "119.0 s");
        assert_eq!(duration(Duration::from_secs(125)), "2 min 05 s");
    }
}
