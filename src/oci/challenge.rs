//! `WWW-Authenticate: Bearer …`, where a registry says who gives out tokens.

/// A bearer challenge (RFC 6750 §3, distribution `docs/spec/auth/token.md`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Challenge {
    /// URL of the token service.
    pub realm: String,
    /// Name the token service knows the registry by.
    pub service: Option<String>,
    /// What the token must allow.
    pub scope: Option<String>,
}

impl Challenge {
    /// The first bearer challenge with a realm among the values of the header.
    pub fn in_headers<'a>(values: impl IntoIterator<Item = &'a str>) -> Option<Challenge> {
        values.into_iter().find_map(Challenge::parse)
    }

    /// The bearer challenge in one header value, which may hold several challenges (RFC 9110 §11.6.1).
    pub fn parse(value: &str) -> Option<Challenge> {
        let mut found: Option<Challenge> = None;
        let mut in_bearer = false;
        let mut rest = value;
        loop {
            rest = rest.trim_start_matches([' ', '\t', ',']);
            if rest.is_empty() {
                break;
            }
            let (word, after) = rest.split_at(rest.find([' ', '\t', ',', '=']).unwrap_or(rest.len()));
            // "name=value" is a parameter, a bare word starts the next challenge.
            let Some(after) = after.trim_start().strip_prefix('=') else {
                if found.is_some() {
                    break;
                }
                in_bearer = word.eq_ignore_ascii_case("bearer");
                rest = after;
                continue;
            };
            let (value, after) = parse_value(after.trim_start());
            rest = after;
            if !in_bearer {
                continue;
            }
            let challenge = found.get_or_insert(Challenge { realm: String::new(), service: None, scope: None });
            match word.to_ascii_lowercase().as_str() {
                "realm" => challenge.realm = value,
                "service" => challenge.service = Some(value),
                "scope" => challenge.scope = Some(value),
                _ => {}
            }
        }
        found.filter(|challenge| !challenge.realm.is_empty())
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
            (r#"Basic realm="r""#, None),
            ("Bearer", None),
            (r#"Bearer service="s""#, None),
            (r#"Bearer realm=""#, None),
            ("", None),
        ] {
            let found = Challenge::parse(value);
            let found = found.as_ref().map(|c| (c.realm.as_str(), c.service.as_deref(), c.scope.as_deref()));
            assert_eq!(found, expected, "{value}");
        }
    }

    #[test]
    fn several_headers_are_searched() {
        assert!(Challenge::in_headers(["Basic realm=x", "Bearer realm=https://a"]).is_some());
        assert!(Challenge::in_headers([]).is_none());
    }

    proptest! {
        #[test]
        fn any_value_parses_or_not_without_panic(value in "\\PC{0,80}", tail in "(Bearer|realm|=|\"|,| |\\\\|é){0,12}") {
            let _ = Challenge::parse(&value);
            let _ = Challenge::parse(&tail);
        }
    }
}
