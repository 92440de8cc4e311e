//! Debian's own kernel, unmodified, as its package holds it.

use crate::host::apt::Apt;
use crate::screen;
use anyhow::{Context, Result};
use std::fs;
use std::path::PathBuf;

/// The series that the project is measured with, and what to take where the archive no longer has it.
const PATTERNS: [&str; 2] =
    ["^linux-image-6\\.1\\.0-[0-9]+-cloud-amd64-unsigned$", "^linux-image-[0-9].*-cloud-amd64-unsigned$"];

/// Whether `name` is a cloud kernel of the series 6.1.0.
fn is_first_choice(name: &str) -> bool {
    let number =
        name.strip_prefix("linux-image-6.1.0-").and_then(|rest| rest.strip_suffix("-cloud-amd64-unsigned"));
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Whether `name` is any cloud kernel for a release of Debian.
fn is_second_choice(name: &str) -> bool {
    name.starts_with("linux-image-") && name.ends_with("-cloud-amd64-unsigned")
}

/// The newest kernel: its bzImage, and what it is.
pub(crate) fn fetch(apt: &mut Apt) -> Result<(PathBuf, String)> {
    let package = if let Some(package) = apt.newest(PATTERNS[0], is_first_choice)? {
        package
    } else {
        let package = apt.newest(PATTERNS[1], is_second_choice)?.context(
            "this machine's package archive has no cloud kernel of Debian's; name a kernel with --kernel",
        )?;
        screen::warn(format_args!("no kernel of the series 6.1.0 in this archive; taking {package}"));
        package
    };
    let root = apt.unpacked(&package)?;
    let image = fs::read_dir(root.join("boot"))
        .with_context(|| format!("{package} has no folder boot"))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-")))
        .with_context(|| format!("{package} holds no kernel"))?;
    let version = apt.version(&package)?;
    Ok((image, format!("{package} {version}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_chosen_by_name() {
        assert!(is_first_choice("linux-image-6.1.0-56-cloud-amd64-unsigned"));
        for name in [
            "linux-image-6.1.0-56-amd64-unsigned",
            "linux-image-6.1.0--cloud-amd64-unsigned",
            "linux-image-cloud-amd64",
        ] {
            assert!(!is_first_choice(name), "{name}");
        }
        assert!(is_second_choice("linux-image-6.12.48+deb13-cloud-amd64-unsigned"));
    }
}
