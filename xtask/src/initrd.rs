//! The small initrd of a Linux guest: busybox, our `init`, the program that makes seeded files, and the Debian
//! packages that were asked for, with the libraries they really need.

use crate::artifacts;
use crate::cpio::{Archive, Entry};
use crate::host::apt::Apt;
use crate::host::programs::Consent;
use crate::host::{folders, libraries, needs};
use crate::screen;
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What a guest has no use for.
const LEFT_OUT: [&str; 6] = [
    "usr/share/doc/",
    "usr/share/man/",
    "usr/share/locale/",
    "usr/share/lintian/",
    "usr/share/bug/",
    "usr/lib/debug/",
];

/// What `init` does once the guest is up.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Task {
    /// Make a file of so many bytes from a seed and compare its checksum with the host's.
    File {
        /// The file's size.
        bytes: u64,
        /// What determines its contents.
        seed: u64,
    },
    /// Run a command and end with its status.
    Run(String),
}

/// Builds the initrd into `out`.
pub(crate) fn build(
    apt: &mut Apt,
    packages: &[String],
    task: &Task,
    consent: Consent,
    out: &Path,
) -> Result<()> {
    let busybox = busybox(apt)?;
    let seedfile = artifacts::seedfile()?;
    let mut archive = Archive::default();
    for package in packages {
        add_package(&mut archive, apt, package)?;
    }
    let program = |path: &Path| -> Result<Entry> {
        let data = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Entry::File { data, executable: true })
    };
    archive.add("bin/busybox", program(&busybox)?);
    archive.add("bin/sh", Entry::Link("busybox".to_owned()));
    archive.add("bin/seedfile", program(&seedfile)?);
    archive.add("bin/finish", program(&artifacts::finish(consent)?)?);
    archive.add("init", program(&folders::root().join("guests/init/init"))?);
    // Linux opens it for `init` before anything is mounted.
    archive.add("dev/console", Entry::Device { major: 5, minor: 1 });
    let (name, text) = match task {
        Task::File { bytes, seed } => {
            ("etc/guest/file", format!("{bytes} {seed} {}\n", checksum(&busybox, &seedfile, *bytes, *seed)?))
        }
        Task::Run(command) => ("etc/guest/run", format!("{command}\n")),
    };
    archive.add(name, Entry::File { data: text.into_bytes(), executable: false });
    fs::write(out, archive.to_bytes()?).with_context(|| format!("cannot write {}", out.display()))
}

/// Debian's statically linked busybox.
fn busybox(apt: &mut Apt) -> Result<PathBuf> {
    let root = apt.unpacked("busybox-static")?;
    let paths = ["bin/busybox", "usr/bin/busybox"].map(|path| root.join(path));
    paths.into_iter().find(|path| path.is_file()).context("the package busybox-static holds no busybox")
}

/// The sha256 of the file that the guest is to make, computed here by the very programs that run there.
fn checksum(busybox: &Path, seedfile: &Path, bytes: u64, seed: u64) -> Result<String> {
    let mut maker = Command::new(seedfile)
        .args([bytes.to_string(), seed.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {}", seedfile.display()))?;
    let file = maker.stdout.take().context("seedfile has no output")?;
    let summer = Command::new(busybox).arg("sha256sum").stdin(file).output();
    let made = maker.wait()?;
    let summed = summer.with_context(|| format!("cannot run {}", busybox.display()))?;
    ensure!(made.success() && summed.status.success(), "the file's checksum cannot be computed");
    let text = String::from_utf8(summed.stdout)?;
    let sum = text.split_whitespace().next().unwrap_or_default();
    ensure!(sum.len() == 64, "busybox sha256sum says `{}`", text.trim());
    Ok(sum.to_owned())
}

/// Adds a package's files and whatever its programs need to be loaded.
fn add_package(archive: &mut Archive, apt: &mut Apt, package: &str) -> Result<()> {
    let root = apt.unpacked(package)?;
    let mut source = libraries::Archive::new(apt);
    let mut programs = Vec::new();
    for path in source.files(package)?.to_vec() {
        if LEFT_OUT.iter().any(|folder| path.starts_with(folder)) {
            continue;
        }
        let full = root.join(&path);
        if full.is_symlink() {
            let target = fs::read_link(&full)?;
            let Some(target) = target.to_str() else { bail!("{path} in {package} links to no UTF-8 path") };
            archive.add(&path, Entry::Link(target.to_owned()));
            continue;
        }
        let entry = file(&full)?;
        if let Entry::File { data, .. } = &entry
            && needs::of(data).is_some()
        {
            programs.push(path.clone());
        }
        archive.add(&path, entry);
    }
    let needed = libraries::close(&mut source, package, &programs)?;
    let count = needed.len();
    for (place, taken) in needed {
        if archive.contains(&place) {
            continue;
        }
        let root = source.apt.unpacked(&taken.package)?;
        let full = libraries::resolve(&root, &taken.path)
            .with_context(|| format!("{} in {} leads nowhere", taken.path, taken.package))?;
        archive.add(&place, file(&full)?);
    }
    screen::note(format_args!("{package} {}: {count} shared libraries", apt.version(package)?));
    Ok(())
}

fn file(path: &Path) -> Result<Entry> {
    use std::os::unix::fs::PermissionsExt;
    let data = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let executable = fs::metadata(path)?.permissions().mode() & 0o111 != 0;
    Ok(Entry::File { data, executable })
}
