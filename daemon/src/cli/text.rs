//! Tables on a terminal, and names that cannot harm it.

use std::borrow::Cow;
use std::io::{self, Write};

/// Columns of text, as wide as their widest cell.
#[derive(Debug)]
pub(super) struct Listing {
    right: Vec<bool>,
    rows: Vec<Vec<String>>,
}

impl Listing {
    /// With these titles; one that begins with `>` belongs to a column that is aligned to the right.
    pub(super) fn new(titles: &[&str]) -> Self {
        let right = titles.iter().map(|t| t.starts_with('>')).collect();
        let head = titles.iter().map(|t| t.trim_start_matches('>').to_owned()).collect();
        Self { right, rows: vec![head] }
    }

    /// Adds a line; cells are cleaned of control characters.
    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().map(|cell| clean(&cell).into_owned()).collect());
    }

    /// Whether there is nothing below the titles.
    pub(super) fn is_empty(&self) -> bool {
        self.rows.len() == 1
    }

    /// Writes titles and lines.
    pub(super) fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let width = |column: usize| {
            self.rows
                .iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.right.len()).map(width).collect();
        for row in &self.rows {
            let mut line = String::new();
            for ((cell, width), right) in row.iter().zip(&widths).zip(&self.right) {
                let cell = if *right { format!("{cell:>width$}  ") } else { format!("{cell:<width$}  ") };
                line.push_str(&cell);
            }
            writeln!(out, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// `text` without control characters: names come from files and from other processes.
pub(super) fn clean(text: &str) -> Cow<'_, str> {
    if text.contains(char::is_control) {
        Cow::Owned(text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect())
    } else {
        Cow::Borrowed(text)
    }
}

/// At most `most` letters of `text`.
pub(super) fn shortened(text: &str, most: usize) -> Cow<'_, str> {
    match text.char_indices().nth(most) {
        Some((end, _)) => Cow::Owned(format!("{}...", &text[..end])),
        None => Cow::Borrowed(text),
    }
}

/// `3 x 5`, or `scalar`.
pub(super) fn shape<T: ToString>(shape: &[T]) -> String {
    if shape.is_empty() {
        return "scalar".to_owned();
    }
    shape.iter().map(T::to_string).collect::<Vec<_>>().join(" x ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_names_cannot_move_the_cursor() {
        let mut listing = Listing::new(&["name", ">size"]);
        listing.row(["a\u{1b}[2Jb".to_owned(), "1".to_owned()]);
        listing.row(["longer name".to_owned(), "1234".to_owned()]);
        let mut out = Vec::new();
        listing.write(&mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert_eq!([shortened("äbc", 3), shortened("äbc", 2), shortened("", 0)], ["äbc", "äb...", ""]);
        assert_eq!(text, "name         size\na\u{fffd}[2Jb          1\nlonger name  1234\n");
    }
}
