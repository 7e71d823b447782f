//! Text of other people's making, made fit for a terminal and a log.

/// `text` with every control character spelled out: what an image's author wrote could otherwise forge lines, or tell the terminal what to do.
/// For one line; our own line breaks are added afterwards.
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_spelled_out_and_nothing_else() {
        for (text, expected) in [
            ("app:1 (linux/amd64) \"quoted\" \\ größe", "app:1 (linux/amd64) \"quoted\" \\ größe"),
            ("\u{1b}[2J\u{1b}]0;x\u{7}", "\\u{1b}[2J\\u{1b}]0;x\\u{7}"),
            ("a\nerror: b\r\t\0", "a\\nerror: b\\r\\t\\u{0}"),
            ("\u{9b}31m\u{7f}", "\\u{9b}31m\\u{7f}"),
        ] {
            assert_eq!(printable(text), expected);
        }
    }
}
