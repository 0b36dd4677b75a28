package block

import (
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strconv"
	"strings"
)

// An option is a field that text can set, see [Options.Decode].
type option struct {
	name   string
	strong bool
	field  reflect.Value
}

// optionsOf lists the fields of the struct that opts points to.
func optionsOf(opts any) []option {
	var list []option
	if v := reflect.ValueOf(opts); v.Kind() == reflect.Pointer && v.Elem().Kind() == reflect.Struct {
		appendOptions(&list, v.Elem())
	}
	return list
}

func appendOptions(list *[]option, v reflect.Value) {
	for i := range v.NumField() {
		f := v.Type().Field(i)
		if f.Anonymous && f.Type.Kind() == reflect.Struct {
			appendOptions(list, v.Field(i))
			continue
		}
		if tag, ok := f.Tag.Lookup("option"); ok {
			name, strong := strings.CutSuffix(tag, ",strong")
			*list = append(*list, option{name, strong, v.Field(i)})
		}
	}
}

// Decode sets fields of the struct that dst points to from o. An option that has no
// field is an error that names it. A field that text can set has a tag
//
//	option:"name"         QEMU's name of the option
//	option:"name,strong"  where the option is needed to open the same data again
//
// and one of the types string, bool, int64 (bytes, or a number), a pointer to one of
// these (nil where it is not given), []string, a type with methods UnmarshalText and
// String, or a slice of structs with such fields. Fields of embedded structs count too.
func (o *Options) Decode(dst any) error {
	rest := o.clone()
	if _, err := rest.decode(dst); err != nil {
		return err
	}
	if name := rest.first(); name != "" {
		return fmt.Errorf("Invalid parameter '%s'", name)
	}
	return nil
}

// Extract is Decode, but takes the options that dst has fields for out of o and leaves
// the others.
func (o *Options) Extract(dst any) error {
	_, err := o.decode(dst)
	return err
}

// decode takes the options that dst has fields for out of o, and tells which were there.
func (o *Options) decode(dst any) (given map[string]bool, err error) {
	given = make(map[string]bool)
	for _, f := range optionsOf(dst) {
		v := o.take(f.name)
		if v == nil {
			continue
		}
		given[f.name] = true
		if err := f.set(v); err != nil {
			return nil, err
		}
	}
	return given, nil
}

func (f *option) set(o *Options) error {
	wrong := func(want string) error {
		return fmt.Errorf("Invalid parameter type for '%s', expected: %s", f.name, want)
	}
	if o.given && o.sub != nil {
		return fmt.Errorf("Parameters '%s.*' used inconsistently", f.name)
	}
	if f.field.Kind() == reflect.Pointer {
		v := reflect.New(f.field.Type().Elem())
		f.field.Set(v)
		f.field = v.Elem()
	}
	if t := f.field.Type(); t.Kind() == reflect.Slice && t.Elem().Kind() == reflect.Struct {
		return f.setList(o)
	}
	text, isText := o.value.(string)
	if n, ok := o.value.(json.Number); ok && f.field.Kind() != reflect.String {
		text, isText = n.String(), true
	}
	if u, ok := f.field.Addr().Interface().(encoding.TextUnmarshaler); ok {
		if !isText {
			return wrong("string")
		}
		if err := u.UnmarshalText([]byte(text)); errors.Is(err, errInvalidDiscard) {
			return err
		} else if err != nil {
			return fmt.Errorf("Parameter '%s' does not accept value '%s'", f.name, text)
		}
		return nil
	}
	switch f.field.Interface().(type) {
	case string:
		if !isText {
			return wrong("string")
		}
		f.field.SetString(text)
	case bool:
		v, isBool := o.value.(bool)
		if _, isNumber := o.value.(json.Number); isText && !isNumber {
			var err error
			if v, err = parseBool(text); err != nil {
				return fmt.Errorf("Parameter '%s' expects 'on' or 'off'", f.name)
			}
		} else if !isBool {
			return wrong("boolean")
		}
		f.field.SetBool(v)
	case int64:
		if !isText {
			return wrong("integer")
		}
		v, err := ParseSize(text)
		if strings.HasPrefix(text, "-") {
			err = errors.New("expects a non-negative number below 2^63")
		} else if err != nil {
			err = fmt.Errorf("expects a size: %w", err)
		}
		if err != nil {
			return fmt.Errorf("Parameter '%s' %w", f.name, err)
		}
		f.field.SetInt(v)
	case []string:
		list, ok := o.list()
		if !ok {
			return wrong("array of strings")
		}
		f.field.Set(reflect.ValueOf(list))
	default:
		return fmt.Errorf("option '%s' has a field of type %s", f.name, f.field.Type())
	}
	return nil
}

// setList sets a slice of structs.
func (f *option) setList(o *Options) error {
	if o.given {
		return fmt.Errorf("Invalid parameter type for '%s', expected: array of objects", f.name)
	}
	list := reflect.MakeSlice(f.field.Type(), len(o.sub), len(o.sub))
	for i := range len(o.sub) {
		name := strconv.Itoa(i)
		sub := o.sub[name]
		if sub == nil || sub.given {
			return fmt.Errorf("Invalid parameter type for '%s', expected: array of objects", f.name)
		}
		if _, err := sub.decode(list.Index(i).Addr().Interface()); err != nil {
			return fmt.Errorf("%s: %w", join(f.name, name), err)
		}
		if rest := sub.first(); rest != "" {
			return fmt.Errorf("Invalid parameter '%s'", join(join(f.name, name), rest))
		}
	}
	f.field.Set(list)
	return nil
}

func parseBool(s string) (bool, error) {
	switch s {
	case "on", "yes", "true", "y":
		return true, nil
	case "off", "no", "false", "n":
		return false, nil
	}
	return false, errors.New("neither on nor off")
}

// strongOptions are the strong options of opts that differ from the defaults, with
// values for [Options.Set].
func strongOptions(opts, defaults any) map[string]any {
	strong := make(map[string]any)
	std := optionsOf(defaults)
	for i, f := range optionsOf(opts) {
		v := f.field.Interface()
		if !f.strong || reflect.DeepEqual(v, std[i].field.Interface()) {
			continue
		}
		if s, ok := v.(fmt.Stringer); ok {
			v = s.String()
		}
		strong[f.name] = v
	}
	return strong
}
