//! The `newc` archive that Linux unpacks as its first root file system.
//!
//! Pure: from a list of files to bytes (format: the kernel's documentation, "initramfs buffer format"). Invariant:
//! the same entries give the same bytes, whenever and wherever they are written: times are fixed, everything
//! belongs to root, inode numbers are positions, and directories that are not named are supplied.

use std::collections::BTreeMap;

/// Modification time of every entry: 2020-01-01 00:00:00 UTC, in seconds.
const TIME: u32 = 1_577_836_800;

/// What an entry is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Entry {
    /// A directory, mode 0755.
    Directory,
    /// A regular file; `executable` chooses mode 0755 over 0644.
    File { data: Vec<u8>, executable: bool },
    /// A symbolic link to a path.
    Link(String),
    /// A character device.
    Device { major: u32, minor: u32 },
}

/// An archive in the making. Paths are relative to the root, without a leading slash.
#[derive(Default, Debug)]
pub(crate) struct Archive {
    entries: BTreeMap<String, Entry>,
}

impl Archive {
    /// Adds an entry and the directories above it. A later entry of the same path replaces the earlier one.
    pub(crate) fn add(&mut self, path: &str, entry: Entry) {
        let path = path.trim_matches('/');
        for (end, _) in path.match_indices('/') {
            self.entries.entry(path[..end].to_owned()).or_insert(Entry::Directory);
        }
        self.entries.insert(path.to_owned(), entry);
    }

    /// Whether something lies at `path`.
    pub(crate) fn contains(&self, path: &str) -> bool {
        self.entries.contains_key(path.trim_matches('/'))
    }

    /// The archive's bytes. Fails on a file of 4 GiB or more, which the format cannot say.
    pub(crate) fn to_bytes(&self) -> anyhow::Result<Vec<u8>> {
        let mut out = Vec::new();
        // A directory sorts before what it holds: its name is a proper prefix.
        for (inode, (path, entry)) in (1..).zip(&self.entries) {
            let (mode, data, device) = match entry {
                Entry::Directory => (0o040_755, &[][..], (0, 0)),
                Entry::File { data, executable: true } => (0o100_755, &data[..], (0, 0)),
                Entry::File { data, executable: false } => (0o100_644, &data[..], (0, 0)),
                Entry::Link(target) => (0o120_777, target.as_bytes(), (0, 0)),
                Entry::Device { major, minor } => (0o020_600, &[][..], (*major, *minor)),
            };
            write_entry(&mut out, path, inode, mode, data, device)?;
        }
        write_entry(&mut out, "TRAILER!!!", 0, 0, &[], (0, 0))?;
        Ok(out)
    }
}

fn write_entry(
    out: &mut Vec<u8>,
    path: &str,
    inode: u32,
    mode: u32,
    data: &[u8],
    device: (u32, u32),
) -> anyhow::Result<()> {
    let Ok(bytes) = u32::try_from(data.len()) else {
        anyhow::bail!("{path}: {} bytes are more than an initrd's entry can hold", data.len());
    };
    let links = if mode & 0o170_000 == 0o040_000 { 2 } else { 1 };
    let name_bytes = u32::try_from(path.len() + 1)?;
    out.extend_from_slice(b"070701");
    // Owner and group, the archive's own device and the checksum (unused without the format's CRC variant) are 0.
    for field in [inode, mode, 0, 0, links, TIME, bytes, 0, 0, device.0, device.1, name_bytes, 0] {
        out.extend_from_slice(format!("{field:08X}").as_bytes());
    }
    out.extend_from_slice(path.as_bytes());
    out.push(0);
    pad(out);
    out.extend_from_slice(data);
    pad(out);
    Ok(())
}

/// Zeros up to the next multiple of four.
fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the format says, read back: path, mode, data.
    fn read(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |index: usize| {
                let text = std::str::from_utf8(&bytes[6 + index * 8..14 + index * 8]).unwrap();
                u32::from_str_radix(text, 16).unwrap() as usize
            };
            let (mode, size, name_size) = (field(1), field(6), field(11));
            let name = std::str::from_utf8(&bytes[110..110 + name_size - 1]).unwrap().to_owned();
            assert_eq!(bytes[110 + name_size - 1], 0);
            let data_at = (110 + name_size).next_multiple_of(4);
            let data = bytes[data_at..data_at + size].to_vec();
            bytes = &bytes[(data_at + size).next_multiple_of(4)..];
            if name == "TRAILER!!!" {
                assert!(bytes.is_empty());
                return entries;
            }
            entries.push((name, u32::try_from(mode).unwrap(), data));
        }
    }

    fn sample() -> Archive {
        let mut archive = Archive::default();
        archive.add("init", Entry::File { data: b"#!/bin/sh\n".to_vec(), executable: true });
        archive.add("/usr/lib/x/libx.so.1", Entry::File { data: vec![1, 2, 3, 4, 5], executable: false });
        archive.add("bin/sh", Entry::Link("busybox".into()));
        archive.add("dev/console", Entry::Device { major: 5, minor: 1 });
        archive
    }

    #[test]
    fn what_is_written_can_be_read() {
        let entries = read(&sample().to_bytes().unwrap());
        let names: Vec<_> = entries.iter().map(|entry| (entry.0.as_str(), entry.1)).collect();
        assert_eq!(
            names,
            [
                ("bin", 0o040_755),
                ("bin/sh", 0o120_777),
                ("dev", 0o040_755),
                ("dev/console", 0o020_600),
                ("init", 0o100_755),
                ("usr", 0o040_755),
                ("usr/lib", 0o040_755),
                ("usr/lib/x", 0o040_755),
                ("usr/lib/x/libx.so.1", 0o100_644),
            ]
        );
        assert_eq!(entries[1].2, b"busybox");
        assert_eq!(entries[8].2, [1, 2, 3, 4, 5]);
    }

    #[test]
    fn order_of_adding_does_not_show() {
        let mut other = Archive::default();
        for (path, entry) in sample().entries.into_iter().rev() {
            other.add(&path, entry);
        }
        assert_eq!(sample().to_bytes().unwrap(), other.to_bytes().unwrap());
    }

    #[test]
    fn the_first_entry_is_what_the_format_says() {
        let mut archive = Archive::default();
        archive.add("a", Entry::File { data: b"hi".to_vec(), executable: false });
        let bytes = archive.to_bytes().unwrap();
        let expected = concat!(
            "070701",
            "00000001",
            "000081A4",
            "00000000",
            "00000000",
            "00000001",
            "5E0BE100",
            "00000002",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000002",
            "00000000",
            "a\0hi\0\0"
        );
        assert_eq!(&bytes[..116], expected.as_bytes());
    }

    #[test]
    fn a_directory_that_is_already_there_stays() {
        let mut archive = Archive::default();
        archive.add("lib", Entry::Link("usr/lib".into()));
        archive.add("lib/x", Entry::Directory);
        assert_eq!(archive.entries["lib"], Entry::Link("usr/lib".into()));
        assert!(archive.contains("/lib/x") && !archive.contains("usr"));
    }
}
