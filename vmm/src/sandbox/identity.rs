//! Whose rights the monitor has: `--user`.

use std::fs;

use super::Error;

/// A user and a group of the host, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

impl Identity {
    /// The identity that `USER[:GROUP]` names: numbers, or names of `/etc/passwd` and `/etc/group`.
    /// The group is the user's own unless it is given.
    ///
    /// # Errors
    /// There is nobody of that name.
    pub(crate) fn find(text: &str) -> Result<Self, Error> {
        let read = |path| fs::read_to_string(path).map_err(|source| Error::Names(path, source));
        let found = parse(text, &read("/etc/passwd")?, &read("/etc/group")?);
        found.ok_or_else(|| Error::Nobody(text.to_owned()))
    }
}

/// Looks names up in the texts of `/etc/passwd` and `/etc/group`.
fn parse(text: &str, users: &str, groups: &str) -> Option<Identity> {
    let (user, group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    let number = |text: &str| {
        text.parse::<u32>()
            .ok()
            .filter(|number| *number != u32::MAX)
    };
    let entry = users.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let (name, uid) = (*fields.first()?, *fields.get(2)?);
        (name == user || uid == user).then_some((number(uid)?, number(fields.get(3)?)?))
    });
    let uid = entry.map(|(uid, _)| uid).or_else(|| number(user))?;
    let gid = match group {
        None => entry?.1,
        Some(group) => number(group).or_else(|| {
            groups.lines().find_map(|line| {
                let mut fields = line.split(':');
                let named = fields.next()? == group;
                number(fields.nth(1)?).filter(|_| named)
            })
        })?,
    };
    Some(Identity { uid, gid })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_and_groups_are_names_or_numbers() {
        let users = "root:x:0:0:root:/root:/bin/sh\nbad\nkvm:x:64055:106::/:/bin/false\n";
        let groups = "root:x:0:\nkvm:x:106:me\nshort\n";
        let find = |text| parse(text, users, groups).map(|found| (found.uid, found.gid));
        assert_eq!(find("kvm"), Some((64055, 106)));
        assert_eq!(find("64055"), Some((64055, 106)));
        assert_eq!(find("kvm:root"), Some((64055, 0)));
        assert_eq!(find("1234:5678"), Some((1234, 5678)));
        // A number without an entry has no group of its own.
        for nobody in [
            "1234",
            "absent",
            "kvm:absent",
            "",
            ":",
            "kvm:",
            "4294967295:1",
            "-1:1",
        ] {
            assert_eq!(find(nobody), None, "{nobody}");
        }
    }
}
