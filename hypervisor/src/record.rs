//! The record of a run: one line of JSON (RFC 8259), written as it goes and without memory of its own, so
//! that it can be written when everything else has failed.

use core::fmt::{self, Display, Write};

/// An object or array that is being written.
pub struct Json<'a, W: Write> {
    out: &'a mut W,
    empty: bool,
    close: char,
}

impl<'a, W: Write> Json<'a, W> {
    /// Begins an object on `out`. It ends with [`end`](Self::end).
    pub fn object(out: &'a mut W) -> Result<Self, fmt::Error> {
        Self::begin(out, '{', '}')
    }

    fn begin(out: &'a mut W, open: char, close: char) -> Result<Self, fmt::Error> {
        out.write_char(open)?;
        Ok(Self { out, empty: true, close })
    }

    /// Writes what stands before a value: a comma, and the name within an object.
    fn lead(&mut self, name: Option<&str>) -> fmt::Result {
        if !core::mem::take(&mut self.empty) {
            self.out.write_char(',')?;
        }
        if let Some(name) = name {
            quote(self.out, &name)?;
            self.out.write_char(':')?;
        }
        Ok(())
    }

    /// A number.
    pub fn number(&mut self, name: &str, value: u64) -> fmt::Result {
        self.lead(Some(name))?;
        write!(self.out, "{value}")
    }

    /// A truth.
    pub fn truth(&mut self, name: &str, value: bool) -> fmt::Result {
        self.lead(Some(name))?;
        write!(self.out, "{value}")
    }

    /// A text.
    pub fn text(&mut self, name: &str, value: &dyn Display) -> fmt::Result {
        self.lead(Some(name))?;
        quote(self.out, value)
    }

    /// A hexadecimal number, as a text: JSON's own numbers do not hold 64 bits.
    pub fn hex(&mut self, name: &str, value: u64) -> fmt::Result {
        self.lead(Some(name))?;
        write!(self.out, "\"{value:#x}\"")
    }

    /// Begins an object within this object.
    pub fn nested(&mut self, name: &str) -> Result<Json<'_, W>, fmt::Error> {
        self.lead(Some(name))?;
        Json::begin(self.out, '{', '}')
    }

    /// Begins an array within this object.
    pub fn array(&mut self, name: &str) -> Result<Json<'_, W>, fmt::Error> {
        self.lead(Some(name))?;
        Json::begin(self.out, '[', ']')
    }

    /// Begins an object within this array.
    pub fn item(&mut self) -> Result<Json<'_, W>, fmt::Error> {
        self.lead(None)?;
        Json::begin(self.out, '{', '}')
    }

    /// Ends the object or array.
    pub fn end(self) -> fmt::Result {
        self.out.write_char(self.close)
    }
}

/// Writes `value` as a JSON string.
fn quote<W: Write>(out: &mut W, value: &dyn Display) -> fmt::Result {
    struct Escaped<'a, W: Write>(&'a mut W);
    impl<W: Write> Write for Escaped<'_, W> {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            for character in text.chars() {
                match character {
                    '"' | '\\' => write!(self.0, "\\{character}")?,
                    '\n' => self.0.write_str("\\n")?,
                    control if u32::from(control) < 0x20 => write!(self.0, "\\u{:04x}", u32::from(control))?,
                    other => self.0.write_char(other)?,
                }
            }
            Ok(())
        }
    }
    out.write_char('"')?;
    write!(Escaped(out), "{value}")?;
    out.write_char('"')
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::String;

    #[test]
    fn the_line_is_json() {
        let mut out = String::new();
        let mut record = Json::object(&mut out).unwrap();
        record.text("end", &"a \"b\" \\ \n\u{1}").unwrap();
        record.number("n", u64::MAX).unwrap();
        let mut exits = record.nested("exits").unwrap();
        exits.hex("x", 0xFEE0_0000).unwrap();
        exits.truth("y", false).unwrap();
        exits.end().unwrap();
        let mut last = record.array("last").unwrap();
        for _ in 0..2 {
            last.item().unwrap().end().unwrap();
        }
        last.end().unwrap();
        record.end().unwrap();
        assert_eq!(
            out,
            r#"{"end":"a \"b\" \\ \n\u0001","n":18446744073709551615,"exits":{"x":"0xfee00000","y":false},"last":[{},{}]}"#
        );
    }
}
