//! The two life cycles of segments. Every change of state goes through here; an illegal one is an error.

use thiserror::Error;

/// `free > filling > complete > retired | free`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ResultLife {
    /// In its session's pool.
    Free,
    /// A job writes it.
    Filling,
    /// Nobody writes it, holders read it.
    Complete,
    /// Given up: never used again, gone when all have unmapped it.
    Retired,
}

/// `free > writing > submitted > writing | free`, and retired with its lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WindowLife {
    /// Of no lane.
    Free,
    /// The client may write.
    Writing,
    /// The daemon reads for a request (and the client writes where the protocol lets it).
    Submitted,
    /// Given up.
    Retired,
}

/// State of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Life {
    Result(ResultLife),
    Window(WindowLife),
}

/// A change of state that neither cycle has: a bug of ours, never a client's doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("a segment cannot go from {from:?} to {to:?}")]
pub(crate) struct IllegalMove {
    pub(crate) from: Life,
    pub(crate) to: Life,
}

impl Life {
    /// The next state, if the cycle has this step.
    pub(crate) fn moved(self, to: Life) -> Result<Life, IllegalMove> {
        use ResultLife as R;
        use WindowLife as W;
        let legal = match (self, to) {
            (Life::Result(from), Life::Result(to)) => matches!(
                (from, to),
                (R::Free, R::Filling | R::Retired)
                    | (R::Filling, R::Complete | R::Free | R::Retired)
                    | (R::Complete, R::Free | R::Retired)
            ),
            (Life::Window(from), Life::Window(to)) => matches!(
                (from, to),
                (W::Free, W::Writing | W::Retired)
                    | (W::Writing, W::Submitted | W::Free)
                    | (W::Submitted, W::Writing | W::Free)
            ),
            _ => false,
        };
        if legal { Ok(to) } else { Err(IllegalMove { from: self, to }) }
    }

    /// Whether it has been given up.
    pub(crate) fn is_retired(self) -> bool {
        matches!(self, Life::Result(ResultLife::Retired) | Life::Window(WindowLife::Retired))
    }

    /// As lists show it.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Life::Result(ResultLife::Free) | Life::Window(WindowLife::Free) => "free",
            Life::Result(ResultLife::Filling) => "filling",
            Life::Result(ResultLife::Complete) => "complete",
            Life::Result(ResultLife::Retired) | Life::Window(WindowLife::Retired) => "retired",
            Life::Window(WindowLife::Writing) => "writing",
            Life::Window(WindowLife::Submitted) => "submitted",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cycles_have_no_short_cuts() {
        use ResultLife as R;
        use WindowLife as W;
        let results = [R::Free, R::Filling, R::Complete, R::Retired].map(Life::Result);
        let windows = [W::Free, W::Writing, W::Submitted, W::Retired].map(Life::Window);
        let all: Vec<_> = results.into_iter().chain(windows).collect();
        let legal: Vec<_> = all
            .iter()
            .flat_map(|from| all.iter().map(move |to| (*from, *to)))
            .filter(|(from, to)| from.moved(*to).is_ok())
            .map(|(from, to)| (from.word(), to.word()))
            .collect();
        assert_eq!(
            legal,
            [
                ("free", "filling"),
                ("free", "retired"),
                ("filling", "free"),
                ("filling", "complete"),
                ("filling", "retired"),
                ("complete", "free"),
                ("complete", "retired"),
                ("free", "writing"),
                ("free", "retired"),
                ("writing", "free"),
                ("writing", "submitted"),
                ("submitted", "free"),
                ("submitted", "writing"),
            ]
        );
        assert!(Life::Result(R::Retired).moved(Life::Result(R::Retired)).is_err());
    }
}
