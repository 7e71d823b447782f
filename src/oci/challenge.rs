//! `WWW-Authenticate`, where a registry says how to log in.

/// How a registry wants to know who is asking.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Challenge {
    /// With a token (RFC 6750 §3, distribution `docs/spec/auth/token.md`).
    Bearer(Bearer),
    /// With name and password (RFC 7617).
    Basic,
}

/// Who gives out tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bearer {
    /// URL of the token service.
    pub realm: String,
    /// Name the token service knows the registry by.
    pub service: Option<String>,
    /// What the token must allow.
    pub scope: Option<String>,
}

impl Challenge {
    /// The challenge to answer among the values of the header: the first for a token that has a realm, else one for a password.
    pub fn in_headers<'a>(values: impl IntoIterator<Item = &'a str>) -> Option<Challenge> {
        let all: Vec<Challenge> = values.into_iter().flat_map(Challenge::parse).collect();
        all.iter().find(|challenge| matches!(challenge, Challenge::Bearer(_))).or(all.first()).cloned()
    }

    /// The challenges of one header value (RFC 9110 §11.6.1) that can be answered.
    pub fn parse(value: &str) -> Vec<Challenge> {
        let mut found = Vec::new();
        let mut rest = value;
        loop {
            rest = rest.trim_start_matches([' ', '\t', ',']);
            if rest.is_empty() {
                break;
            }
            let (word, after) = rest.split_at(rest.find([' ', '\t', ',', '=']).unwrap_or(rest.len()));
            // "name=value" is a parameter, a bare word starts the next challenge.
            let Some(after) = after.trim_start().strip_prefix('=') else {
                found.push(match word.to_ascii_lowercase().as_str() {
                    "bearer" => Some(Challenge::Bearer(Bearer::default())),
                    "basic" => Some(Challenge::Basic),
                    _ => None,
                });
                rest = after;
                continue;
            };
            let (value, after) = parse_value(after.trim_start());
            rest = after;
            let Some(Some(Challenge::Bearer(bearer))) = found.last_mut() else { continue };
            match word.to_ascii_lowercase().as_str() {
                "realm" => bearer.realm = value,
                "service" => bearer.service = Some(value),
                "scope" => bearer.scope = Some(value),
                _ => {}
            }
        }
        let complete = |challenge: &Challenge| !matches!(challenge, Challenge::Bearer(bearer) if bearer.realm.is_empty());
        found.into_iter().flatten().filter(complete).collect()
    }
}

/// A token or a quoted string, and what follows it.
fn parse_value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let (value, rest) = text.split_at(text.find([' ', '\t', ',']).unwrap_or(text.len()));
        return (value.to_owned(), rest);
    };
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return (value, &quoted[at + 1..]),
            '\\' => value.extend(chars.next().map(|(_, escaped)| escaped)),
            c => value.push(c),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bearer_challenges_are_found() {
        for (value, expected) in [
            (
                r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/debian:pull""#,
                Some(("https://auth.docker.io/token", Some("registry.docker.io"), Some("repository:library/debian:pull"))),
            ),
            (r#"bearer realm=https://a/t , error="x,y""#, Some(("https://a/t", None, None))),
            (r#"Basic realm="r", Bearer realm="https://a/t",scope="a b""#, Some(("https://a/t", None, Some("a b")))),
            (r#"Bearer realm="https://a/t", Basic realm="r""#, Some(("https://a/t", None, None))),
            (r#"Bearer REALM = "https://a/\"t""#, Some(("https://a/\"t", None, None))),
            (r#"Negotiate abc==, Bearer realm="https://a""#, Some(("https://a", None, None))),
            ("Bearer", None),
            (r#"Bearer service="s""#, None),
            (r#"Bearer realm=""#, None),
            ("", None),
        ] {
            let found = match Challenge::in_headers([value]) {
                Some(Challenge::Bearer(bearer)) => Some(bearer),
                _ => None,
            };
            let found = found.as_ref().map(|c| (c.realm.as_str(), c.service.as_deref(), c.scope.as_deref()));
            assert_eq!(found, expected, "{value}");
        }
    }

    #[test]
    fn a_token_is_preferred_to_a_password_in_any_header() {
        for (values, bearer) in [
            (&["Basic realm=x", "Bearer realm=https://a"][..], Some(true)),
            (&["BASIC realm=\"x\""], Some(false)),
            (&["Basic realm=\"x\", Bearer service=s"], Some(false)),
            (&["Digest realm=\"x\""], None),
            (&[], None),
        ] {
            let found = Challenge::in_headers(values.iter().copied());
            assert_eq!(found.map(|c| matches!(c, Challenge::Bearer(_))), bearer, "{values:?}");
        }
    }

    proptest! {
        #[test]
        fn any_value_parses_or_not_without_panic(value in "\\PC{0,80}", tail in "(Bearer|realm|=|\"|,| |\\\\|é){0,12}") {
            let _ = Challenge::parse(&value);
            let _ = Challenge::parse(&tail);
        }
    }
}
