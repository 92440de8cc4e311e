//! Accesses, the rights that tables grant, and who may do what: the permission rules of paging.
//!
//! Pure. [`check`] is SDM 4.6 and APM 5.6 as one function; every format
//! combines the rights of a walk's entries by AND, so one type serves them all.

use crate::fault::code;
use crate::features::Quirks;
use crate::registers::Paging;
use std::fmt;

/// What an access does.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum AccessKind {
    /// Reads data.
    Read,
    /// Writes data.
    Write,
    /// Fetches an instruction.
    Fetch,
}

/// With which privilege.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Privilege {
    /// At CPL 3.
    User,
    /// At CPL 0 to 2, by an instruction's own operand; `ac` is RFLAGS.AC.
    Supervisor {
        /// RFLAGS.AC: data accesses to user pages are allowed in spite of SMAP.
        ac: bool,
    },
    /// By the processor itself, to a system structure (descriptor tables, task state), at any CPL.
    /// RFLAGS.AC does not help it (SDM 4.6: implicit supervisor-mode accesses).
    Implicit,
}

/// One access.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Access {
    /// What it does.
    pub kind: AccessKind,
    /// With which privilege.
    pub privilege: Privilege,
}

impl Access {
    /// Every user access.
    pub const fn user(kind: AccessKind) -> Self {
        Self { kind, privilege: Privilege::User }
    }

    /// A supervisor's, with RFLAGS.AC clear.
    pub const fn supervisor(kind: AccessKind) -> Self {
        Self { kind, privilege: Privilege::Supervisor { ac: false } }
    }

    /// The processor's own read or write, while it is at CPL 3 or below, with RFLAGS.AC as it is: implicit,
    /// but as an instruction's own where a quirk has AC help it.
    pub const fn implicit(kind: AccessKind, user: bool, ac: bool, quirks: &Quirks) -> Self {
        let helped = if user { quirks.ac_helps_implicit_of_user } else { quirks.ac_helps_implicit };
        let privilege = if helped { Privilege::Supervisor { ac } } else { Privilege::Implicit };
        Self { kind, privilege }
    }

    /// The bits of a page-fault error code that only the access decides: W/R, U/S, I/D (SDM 4.7, APM 8.4.2).
    pub(crate) const fn code(self, paging: &Paging) -> u32 {
        let kind = match self.kind {
            AccessKind::Read => 0,
            AccessKind::Write => code::WRITE,
            // I/D is reported where something can forbid a fetch.
            AccessKind::Fetch if paging.nx || paging.smep => code::FETCH,
            AccessKind::Fetch => 0,
        };
        match self.privilege {
            Privilege::User => kind | code::USER,
            Privilege::Supervisor { .. } | Privilege::Implicit => kind,
        }
    }
}

/// What a walk grants so far. Ordinary tables always grant reading; EPT has no user bit and always grants it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Rights(u8);

impl Rights {
    /// Data may be read.
    pub const READ: Self = Self(1);
    /// Data may be written.
    pub const WRITE: Self = Self(2);
    /// Instructions may be fetched.
    pub const EXECUTE: Self = Self(4);
    /// It is a user-mode address.
    pub const USER: Self = Self(8);
    /// Everything: what a walk starts with.
    pub const ALL: Self = Self(15);
    /// Nothing.
    pub const NONE: Self = Self(0);

    /// What both grant: the rule for combining the levels of a walk.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// What either grants.
    #[must_use]
    pub const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// `self` if `granted`, else nothing.
    #[must_use]
    pub const fn when(self, granted: bool) -> Self {
        if granted { self } else { Self::NONE }
    }

    /// Whether all of `other` is granted.
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Read, write, execute as bits 0 to 2, the order of an EPT entry.
    pub const fn ept_bits(self) -> u8 {
        self.0 & 7
    }
}

impl fmt::Debug for Rights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (right, letter) in
            [(Self::READ, "r"), (Self::WRITE, "w"), (Self::EXECUTE, "x"), (Self::USER, "u")]
        {
            f.write_str(if self.has(right) { letter } else { "-" })?;
        }
        Ok(())
    }
}

impl fmt::Display for Rights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Whether `access` may use a page with these rights and this protection key; otherwise the error code.
///
/// The rules, SDM 4.6.1 and 4.6.2. The address is a *user-mode address* if every entry of the walk has U/S
/// set, else a *supervisor-mode address*.
pub fn check(paging: &Paging, quirks: &Quirks, rights: Rights, key: u8, access: Access) -> Result<(), u32> {
    let user_page = rights.has(Rights::USER);
    let user_access = access.privilege == Privilege::User;
    let ac = access.privilege == Privilege::Supervisor { ac: true };
    let allowed = if user_access {
        // User accesses: never to supervisor pages; to user pages as R/W and XD say.
        user_page
            && match access.kind {
                AccessKind::Read => true,
                AccessKind::Write => rights.has(Rights::WRITE),
                AccessKind::Fetch => rights.has(Rights::EXECUTE),
            }
    } else {
        // Supervisor accesses: SMAP and SMEP keep them from user pages; R/W counts under CR0.WP.
        let smap_allows = !user_page || !paging.smap || ac;
        match access.kind {
            AccessKind::Read => smap_allows,
            AccessKind::Write => smap_allows && (!paging.wp || rights.has(Rights::WRITE)),
            AccessKind::Fetch => rights.has(Rights::EXECUTE) && !(user_page && paging.smep),
        }
    };
    // Protection keys: data accesses to user pages, by user and supervisor alike; WD binds a supervisor only
    // under CR0.WP.
    let key_counts = user_page || quirks.keys_of_supervisor_pages;
    let key_denies = paging.pke && key_counts && access.kind != AccessKind::Fetch && {
        let pair = paging.pkru >> (2 * u32::from(key & 15));
        let (access_disable, write_disable) = (pair & 1 != 0, pair & 2 != 0);
        let write = access.kind == AccessKind::Write;
        let access_disable = access_disable && (user_access || !quirks.access_disable_spares_supervisor);
        access_disable || write_disable && write && (user_access || paging.wp)
    };
    if allowed && !key_denies {
        return Ok(());
    }
    // SDM 4.7: PK tells that the key denies the access, whatever else does.
    Err(code::PRESENT | access.code(paging) | if key_denies { code::KEY } else { 0 })
}
