//! From options to specs in which nothing is implied.

use std::collections::HashMap;

use shmquant_kernels::{Affine, Granularity, Mapping, OnNonFinite, Scheme};

use super::error::{Details, InputError};
use super::options::{OverrideSpec, Pattern, TableOptions};
use crate::descriptor::{Role, Spec};

/// Group size where groups are asked for without one.
const GROUP: u32 = 128;
/// Most distinct specs of a descriptor.
const MOST_SPECS: usize = 1024;

/// Resolves names to specs and collects the distinct ones.
pub(super) struct Specs<'a> {
    options: &'a TableOptions,
    exact: HashMap<&'a str, usize>,
    used: Vec<bool>,
    list: Vec<Spec>,
}

/// A layer that stays as it is.
const AS_IS: Spec = Spec {
    affine: None,
    granularity: Granularity::Tensor,
    on_nonfinite: OnNonFinite::Error,
    packed: false,
    group_size: 0,
};

struct Request {
    scheme: Scheme,
    mapping: Option<Mapping>,
    granularity: Option<Granularity>,
    group_size: Option<u32>,
    packed: Option<bool>,
    on_nonfinite: OnNonFinite,
}

impl<'a> Specs<'a> {
    pub(super) fn new(options: &'a TableOptions) -> Result<Self, InputError> {
        let mut exact = HashMap::new();
        for (i, entry) in options.overrides.iter().enumerate() {
            if let Pattern::Exact(name) = &entry.pattern {
                exact.entry(name.as_str()).or_insert(i);
            }
        }
        let it = Self { options, exact, used: vec![false; options.overrides.len()], list: Vec::new() };
        it.check_params()?;
        Ok(it)
    }

    /// Whether an override leaves this name as it is.
    pub(super) fn is_left(&mut self, name: &str) -> bool {
        self.find(name).is_some_and(|i| self.options.overrides[i].action.is_none())
    }

    /// The spec of a name, by its index.
    pub(super) fn resolve(&mut self, name: &str, role: Role) -> Result<usize, InputError> {
        let found = self.find(name).map(|i| self.options.overrides[i].action);
        let spec = match found {
            Some(None) => AS_IS,
            Some(Some(action)) => build(self.overridden(action), role, "overrides")?,
            None => self.default_spec(role)?,
        };
        if let Some(i) = self.list.iter().position(|s| *s == spec) {
            return Ok(i);
        }
        if self.list.len() == MOST_SPECS {
            let what = format!("the overrides make more than {MOST_SPECS} different specs");
            return Err(InputError::Argument(Box::new(InputError::argument("overrides", what))));
        }
        self.list.push(spec);
        Ok(self.list.len() - 1)
    }

    pub(super) fn get(&self, index: usize) -> &Spec {
        &self.list[index]
    }

    /// The distinct specs; an exact override that named nothing is an error.
    pub(super) fn finish(self, role: &str) -> Result<Vec<Spec>, InputError> {
        for (entry, used) in self.options.overrides.iter().zip(&self.used) {
            let Pattern::Exact(name) = &entry.pattern else { continue };
            if !used && !self.options.part_of_stream {
                let details = InputError::argument("overrides", format!("override '{name}' names no {role}"))
                    .value(name)
                    .hint("\"re:...\" or a pattern with * names several");
                return Err(InputError::Argument(Box::new(details)));
            }
        }
        Ok(self.list)
    }

    /// The distinct specs, whatever the overrides named.
    pub(super) fn into_list(self) -> Vec<Spec> {
        self.list
    }

    fn find(&mut self, name: &str) -> Option<usize> {
        let regex = |p: &Pattern| matches!(p, Pattern::Regex(r) if r.is_match(name));
        let found = self.exact.get(name).copied();
        let found = found.or_else(|| self.options.overrides.iter().position(|o| regex(&o.pattern)))?;
        self.used[found] = true;
        Some(found)
    }

    fn default_spec(&self, role: Role) -> Result<Spec, InputError> {
        let o = self.options;
        if let Some(params) = &o.params {
            let granularity = if role == Role::Plain { Granularity::Tensor } else { params.granularity() };
            let request = Request {
                scheme: params.scheme(),
                mapping: Some(params.mapping()),
                granularity: Some(granularity),
                group_size: None,
                packed: o.packed,
                on_nonfinite: o.on_nonfinite,
            };
            return build(request, role, "params");
        }
        let request = Request {
            scheme: o.scheme,
            mapping: o.mapping,
            granularity: o.granularity,
            group_size: o.group_size,
            packed: o.packed,
            on_nonfinite: o.on_nonfinite,
        };
        // The options of a table are those of its vectors or layers: a plain column has no choice.
        let request = match role {
            Role::Plain => Request { granularity: None, group_size: None, ..request },
            _ => request,
        };
        build(request, role, "granularity")
    }

    fn overridden(&self, action: OverrideSpec) -> Request {
        let o = self.options;
        let own = action.scheme.is_some();
        let inherit = |part: bool| !own && part;
        let shape = action.granularity.is_some() || action.group_size.is_some();
        Request {
            scheme: action.scheme.unwrap_or(o.scheme),
            mapping: action.mapping.or(o.mapping.filter(|_| !own)),
            granularity: action.granularity.or(o.granularity.filter(|_| inherit(!shape))),
            group_size: action.group_size.or(o.group_size.filter(|_| inherit(!shape))),
            packed: action.packed.or(o.packed),
            on_nonfinite: action.on_nonfinite.unwrap_or(o.on_nonfinite),
        }
    }

    /// Params bring everything along that decides about codes.
    fn check_params(&self) -> Result<(), InputError> {
        let o = self.options;
        let Some(params) = &o.params else { return Ok(()) };
        let clash = |argument: &'static str, what: String| {
            let details =
                InputError::argument(argument, what).hint("leave it out: params bring their own along");
            Err(InputError::Argument(Box::new(details)))
        };
        match (o.mapping, o.granularity, o.group_size) {
            (Some(m), _, _) if m != params.mapping() => {
                clash("mapping", format!("mapping {m} does not fit params of mapping {}", params.mapping()))
            }
            (_, Some(g), _) if g != params.granularity() => {
                let own = params.granularity();
                clash("granularity", format!("granularity {g} does not fit params of granularity {own}"))
            }
            (_, _, Some(g)) => {
                clash("group_size", format!("group_size {g} does not fit params, which have no groups"))
            }
            _ if o.overrides.iter().any(|entry| entry.action.is_some()) => {
                clash("overrides", "an override cannot change the scheme of given params".to_owned())
            }
            _ => Ok(()),
        }
    }
}

fn build(request: Request, role: Role, argument: &'static str) -> Result<Spec, InputError> {
    let fail = |details: Details| Err(InputError::Argument(Box::new(details)));
    let Request { scheme, mapping, granularity, group_size, packed, on_nonfinite } = request;
    let affine = match Affine::new(scheme, mapping) {
        Ok(affine) => affine,
        Err(fault) => {
            let own = scheme.default_mapping();
            let details =
                InputError::argument("mapping", fault.to_string()).hint(format!("{scheme} is {own}"));
            return fail(match mapping {
                Some(mapping) => details.value(mapping),
                None => details,
            });
        }
    };
    let granularity = match (granularity, group_size, role) {
        (Some(granularity), _, _) => granularity,
        (None, Some(_), _) => Granularity::Group,
        (None, None, Role::Plain) => Granularity::Tensor,
        (None, None, Role::Layer) if affine.bits < 8 => Granularity::Group,
        (None, None, _) => Granularity::Row,
    };
    let group_size = match (granularity, group_size) {
        (Granularity::Group, size) => size.unwrap_or(GROUP),
        (other, Some(size)) => {
            let what = format!("group_size {size} does not go with granularity {other}");
            let details = InputError::argument("group_size", what).value(size);
            return fail(details.hint("group_size alone means granularity=\"group\""));
        }
        (_, None) => 0,
    };
    if granularity == Granularity::Group && !(1..=i32::MAX as u32).contains(&group_size) {
        let details =
            InputError::argument("group_size", format!("group_size {group_size} is not in 1..2^31"));
        return fail(details.value(group_size).hint("128 and 32 are usual"));
    }
    if role == Role::Plain && granularity != Granularity::Tensor {
        let what = format!("a plain column has one range for all its values, not granularity {granularity}");
        return fail(InputError::argument(argument, what).value(granularity).hint("granularity=\"tensor\""));
    }
    let packed = role != Role::Plain && affine.bits < 8 && packed.unwrap_or(true);
    Ok(Spec { affine: Some(affine), granularity, on_nonfinite, packed, group_size })
}
