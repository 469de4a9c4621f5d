//! The catalog: results under names, and the requests that are making one (single flight).

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hasher};
use std::time::SystemTime;

use shmquant_protocol::message::Extent;

/// What a dataset was made from and how: equal fingerprints mean equal contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fingerprint {
    /// Of the source values, by the client.
    digest: [u8; 16],
    /// Of the descriptor: structure and specs.
    spec: [u64; 2],
}

impl Fingerprint {
    pub(crate) fn new(digest: [u8; 16], descriptor: &[u8]) -> Self {
        let hash = |salt: u8| {
            let mut hasher = DefaultHasher::new();
            hasher.write_u8(salt);
            hasher.write(descriptor);
            hasher.finish()
        };
        Self { digest, spec: [hash(0), hash(1)] }
    }
}

/// Where a dataset comes from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Origin {
    /// The result that was published: the dataset's own extent, or what it is a copy of.
    pub(crate) extent: Extent,
    /// Unknown for a result that was published later.
    pub(crate) fingerprint: Option<Fingerprint>,
}

/// A result under a name.
#[derive(Debug, Clone)]
pub(crate) struct Dataset {
    pub(crate) name: String,
    pub(crate) extent: Extent,
    pub(crate) origin: Origin,
    pub(crate) created: SystemTime,
    pub(crate) pid: i32,
    pub(crate) command: String,
}

/// What a named request finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found {
    /// The very dataset: open it.
    Existing(Extent),
    /// Another request makes this name: wait.
    InFlight,
    /// Another spec or source.
    Taken,
    /// Nobody: the name is reserved for the asker now.
    Mine,
}

/// All names.
#[derive(Debug, Default)]
pub(crate) struct Catalog {
    datasets: BTreeMap<u64, Dataset>,
    names: HashMap<String, u64>,
    flights: HashMap<String, SystemTime>,
    last: u64,
}

impl Catalog {
    pub(crate) fn get(&self, name: &str) -> Option<&Dataset> {
        self.datasets.get(self.names.get(name)?)
    }

    /// Asks for a name; with [`Found::Mine`] the asker must call [`land`](Self::land).
    pub(crate) fn reserve(&mut self, name: &str, fingerprint: Fingerprint, replace: bool) -> Found {
        if let Some(dataset) = self.get(name) {
            if dataset.origin.fingerprint == Some(fingerprint) {
                return Found::Existing(dataset.extent);
            }
            if !replace {
                return Found::Taken;
            }
        }
        if self.flights.contains_key(name) {
            return Found::InFlight;
        }
        self.flights.insert(name.to_owned(), SystemTime::now());
        Found::Mine
    }

    /// Ends a flight, whether or not it brought a dataset.
    pub(crate) fn land(&mut self, name: &str) {
        self.flights.remove(name);
    }

    /// Names and start of the requests that are making a dataset.
    pub(crate) fn flights(&self) -> impl Iterator<Item = (&str, SystemTime)> {
        self.flights.iter().map(|(name, since)| (name.as_str(), *since))
    }

    /// Puts a dataset under its name; gives the one that was there.
    pub(crate) fn put(&mut self, dataset: Dataset) -> Option<Dataset> {
        let before = self.remove(&dataset.name);
        self.last += 1;
        self.names.insert(dataset.name.clone(), self.last);
        self.datasets.insert(self.last, dataset);
        before
    }

    pub(crate) fn remove(&mut self, name: &str) -> Option<Dataset> {
        let serial = self.names.remove(name)?;
        self.datasets.remove(&serial)
    }

    /// Datasets in the order in which they were made, after `cursor`.
    pub(crate) fn after(&self, cursor: u64) -> impl Iterator<Item = (u64, &Dataset)> {
        let from = cursor.saturating_add(1);
        self.datasets.range(from..).map(|(serial, dataset)| (*serial, dataset))
    }

    pub(crate) fn len(&self) -> usize {
        self.datasets.len()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn dataset(name: &str, segment: u64, fingerprint: Fingerprint) -> Dataset {
        let extent = Extent { segment, generation: 1, offset: 0, length: 1 };
        Dataset {
            name: name.to_owned(),
            extent,
            origin: Origin { extent, fingerprint: Some(fingerprint) },
            created: SystemTime::UNIX_EPOCH,
            pid: 1,
            command: String::new(),
        }
    }

    #[test]
    fn one_flight_a_name() {
        let mut catalog = Catalog::default();
        let (a, b) = (Fingerprint::new([1; 16], b"spec"), Fingerprint::new([1; 16], b"other"));
        assert_ne!(a, b);
        assert_eq!(catalog.reserve("x", a, false), Found::Mine);
        assert_eq!(catalog.reserve("x", a, false), Found::InFlight);
        assert!(catalog.put(dataset("x", 7, a)).is_none());
        catalog.land("x");
        assert!(matches!(catalog.reserve("x", a, false), Found::Existing(e) if e.segment == 7));
        assert_eq!(catalog.reserve("x", b, false), Found::Taken);
        assert_eq!(catalog.reserve("x", b, true), Found::Mine);
        assert_eq!(catalog.put(dataset("x", 8, b)).map(|d| d.extent.segment), Some(7));
        catalog.land("x");
        assert_eq!(catalog.after(0).map(|(_, d)| d.extent.segment).collect::<Vec<_>>(), [8]);
        assert!(catalog.remove("x").is_some() && catalog.remove("x").is_none());
    }

    const NAMES: [&str; 4] = ["a", "b", "c", "d"];

    proptest! {
        #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

        /// Single flight, names and pages against plain maps.
        #[test]
        fn the_catalog_is_a_map_of_names(steps in prop::collection::vec((0u8..5, 0u8..4, 0u8..3, any::<bool>()), 1..80)) {
            let mut catalog = Catalog::default();
            let mut names = BTreeMap::<&str, (u64, Option<u8>)>::new();
            let mut order = Vec::<&str>::new();
            let mut flights = BTreeSet::<&str>::new();
            let print = |kind: u8| Fingerprint::new([kind; 16], b"spec");
            for (serial, (what, name, kind, replace)) in steps.into_iter().enumerate() {
                let name = NAMES[usize::from(name)];
                match what {
                    0 | 1 => {
                        let found = catalog.reserve(name, print(kind), replace);
                        let expected = match names.get(name) {
                            Some((segment, Some(there))) if *there == kind => {
                                let extent = Extent { segment: *segment, generation: 1, offset: 0, length: 1 };
                                Found::Existing(extent)
                            }
                            Some(_) if !replace => Found::Taken,
                            _ if flights.contains(name) => Found::InFlight,
                            _ => Found::Mine,
                        };
                        prop_assert_eq!(found, expected);
                        if found == Found::Mine {
                            flights.insert(name);
                        }
                    }
                    2 => {
                        let segment = serial as u64;
                        let extent = Extent { segment, generation: 1, offset: 0, length: 1 };
                        let before = catalog.put(Dataset {
                            name: name.to_owned(),
                            extent,
                            origin: Origin { extent, fingerprint: replace.then(|| print(kind)) },
                            created: SystemTime::UNIX_EPOCH,
                            pid: 1,
                            command: String::new(),
                        });
                        let known = names.insert(name, (segment, replace.then_some(kind)));
                        prop_assert_eq!(before.map(|d| d.extent.segment), known.map(|(segment, _)| segment));
                        order.retain(|n| *n != name);
                        order.push(name);
                    }
                    3 => {
                        catalog.land(name);
                        flights.remove(name);
                    }
                    _ => {
                        let removed = catalog.remove(name).map(|d| d.extent.segment);
                        prop_assert_eq!(removed, names.remove(name).map(|(segment, _)| segment));
                        order.retain(|n| *n != name);
                    }
                }
                prop_assert_eq!(catalog.len(), names.len());
                let listed: Vec<_> = catalog.after(0).map(|(_, d)| d.name.as_str()).collect();
                prop_assert_eq!(&listed, &order);
                let mut cursor = 0;
                for name in &order {
                    let (serial, next) = catalog.after(cursor).next().unwrap();
                    prop_assert_eq!(next.name.as_str(), *name);
                    prop_assert_eq!(catalog.get(name).map(|d| d.extent.segment), Some(names[name].0));
                    cursor = serial;
                }
                let flying: BTreeSet<_> = catalog.flights().map(|(name, _)| name).collect();
                prop_assert_eq!(&flying, &flights);
            }
        }
    }
}
