//! The emulator's command line.
//!
//! Pure. File names are relative to the folder in which the emulator runs, chosen so that they need no escaping: a
//! multiboot module's name ends at the first space.

use std::ffi::OsString;

/// Name of the image in the run's folder.
pub(crate) const IMAGE: &str = "image";
/// Names of the modules there, in order.
pub(crate) const MODULES: [&str; 2] = ["guest", "initrd"];
/// What the first serial port sent: the guest's console.
pub(crate) const CONSOLE: &str = "console.log";
/// What the second serial port sent: the hypervisor's channel.
pub(crate) const CHANNEL: &str = "hypervisor.log";
/// The monitor's socket.
pub(crate) const MONITOR: &str = "monitor";

/// A machine to be emulated.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Machine {
    /// CPU model with its features, as `-cpu` takes it.
    pub(crate) cpu: String,
    /// Memory in MiB.
    pub(crate) memory_mib: u64,
    /// Whether time counts instructions, so that two runs are identical.
    pub(crate) icount: bool,
    /// Whether the event timer (HPET) can send messages, as the image's own timer needs it.
    pub(crate) timer: bool,
    /// The image's command line.
    pub(crate) line: String,
    /// The modules' command lines, in the order of [`MODULES`].
    pub(crate) modules: Vec<String>,
    /// More words for the emulator.
    pub(crate) extra: Vec<String>,
}

impl Machine {
    /// The words after the emulator's name.
    pub(crate) fn arguments(&self) -> Vec<OsString> {
        let mut words: Vec<String> = Vec::new();
        let mut add = |text: &str| words.extend(text.split(' ').map(str::to_owned));
        add("-accel tcg -machine pc,smm=off -smp 1 -nodefaults -display none -no-reboot");
        // fw_cfg keeps its DMA port: QEMU's multiboot loader, which runs in the machine, reads the image through it.
        add("-seed 1");
        if self.icount {
            add("-icount shift=0,sleep=off -rtc base=2020-01-01,clock=vm");
        }
        if self.timer {
            add("-global hpet.msi=on");
        }
        // Files and not pipes: a serial line that had to wait for its reader would disturb the count.
        add(&format!("-chardev file,id=console,path={CONSOLE} -serial chardev:console"));
        add(&format!("-chardev file,id=channel,path={CHANNEL} -serial chardev:channel"));
        add("-device isa-debug-exit,iobase=0xf4,iosize=4");
        // The machine starts once the monitor is connected.
        add(&format!(
            "-chardev socket,id=monitor,path={MONITOR},server=on,wait=on -mon chardev=monitor,mode=control"
        ));
        add(&format!("-m {}M -cpu", self.memory_mib));
        words.push(self.cpu.clone());
        words.extend(["-kernel".into(), IMAGE.into(), "-append".into(), self.line.clone()]);
        if !self.modules.is_empty() {
            let modules = MODULES.iter().zip(&self.modules).map(|(name, line)| module(name, line));
            words.extend(["-initrd".into(), modules.collect::<Vec<_>>().join(",")]);
        }
        words.extend(self.extra.iter().cloned());
        words.into_iter().map(OsString::from).collect()
    }
}

/// One module's part of `-initrd`: commas part the modules, so a comma in a command line is written twice.
fn module(name: &str, line: &str) -> String {
    let line = line.replace(',', ",,");
    if line.is_empty() { name.to_owned() } else { format!("{name} {line}") }
}

/// Parts `text` into words as a shell does: at spaces, but for those within single or double quotes.
pub(crate) fn split_words(text: &str) -> Result<Vec<String>, String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    for letter in text.chars() {
        match quote {
            Some(end) if letter == end => quote = None,
            Some(_) => word.get_or_insert_default().push(letter),
            None if letter == '\'' || letter == '"' => {
                quote = Some(letter);
                word.get_or_insert_default();
            }
            None if letter.is_whitespace() => words.extend(word.take()),
            None => word.get_or_insert_default().push(letter),
        }
    }
    if let Some(quote) = quote {
        return Err(format!("a {quote} is not closed in `{text}`"));
    }
    words.extend(word);
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Machine {
        Machine {
            cpu: "EPYC,+svm,+npt".into(),
            memory_mib: 1200,
            icount: false,
            timer: false,
            line: "mode=npt seed=1".into(),
            modules: vec!["console=ttyS0,115200 x".into(), String::new()],
            extra: vec!["-d".into(), "int".into()],
        }
    }

    fn after<'a>(words: &'a [OsString], option: &str) -> Vec<&'a str> {
        let positions = words.iter().enumerate().filter(|(_, word)| *word == option);
        positions.map(|(position, _)| words[position + 1].to_str().unwrap()).collect()
    }

    #[test]
    fn commas_in_the_guest_s_line_are_doubled_and_nothing_else_is_parted() {
        let words = machine().arguments();
        assert_eq!(after(&words, "-initrd"), ["guest console=ttyS0,,115200 x,initrd"]);
        assert_eq!(after(&words, "-append"), ["mode=npt seed=1"]);
        assert_eq!(after(&words, "-cpu"), ["EPYC,+svm,+npt"]);
        assert_eq!(after(&words, "-m"), ["1200M"]);
        assert_eq!(words[words.len() - 2..], ["-d", "int"]);
    }

    #[test]
    fn counting_instructions_fixes_clock_and_speed() {
        assert!(after(&machine().arguments(), "-icount").is_empty());
        let words = Machine { icount: true, ..machine() }.arguments();
        assert_eq!(after(&words, "-icount"), ["shift=0,sleep=off"]);
        assert_eq!(after(&words, "-rtc"), ["base=2020-01-01,clock=vm"]);
    }

    #[test]
    fn the_event_timer_is_as_the_machine_has_it_unless_it_is_needed() {
        assert!(after(&machine().arguments(), "-global").is_empty());
        let words = Machine { timer: true, ..machine() }.arguments();
        assert_eq!(after(&words, "-global"), ["hpet.msi=on"]);
    }

    #[test]
    fn no_module_no_option() {
        let words = Machine { modules: Vec::new(), ..machine() }.arguments();
        assert!(after(&words, "-initrd").is_empty());
    }

    #[test]
    fn words_are_parted_as_a_shell_does() {
        let words = |text| split_words(text).unwrap();
        assert_eq!(words(""), Vec::<String>::new());
        assert_eq!(words("  -d int  -D 'a b' "), ["-d", "int", "-D", "a b"]);
        assert_eq!(words(r#"x"y z"'"' "" "#), [r#"xy z""#, ""]);
        assert!(split_words("'a").is_err());
    }
}
