package block

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Bounds of what is parsed: the text in bytes, how deep names go, and the length of
// each part of a name. Options come from the operator, but may be made by programs.
const (
	maxOptionText  = 256 << 10
	maxOptionDepth = 512
	maxOptionName  = 127
)

// Options are the options of a node by name, as text gives them, while it is open
// which driver they are for. Option "b" of the child "a" is named "a.b". The zero
// value has none.
type Options struct {
	given bool
	value any // nil (the null of JSON), string, bool or json.Number
	sub   map[string]*Options
}

// ParseOptions reads options in one of two spellings: a JSON object, or
// KEY=VALUE,... where a comma in a value is written twice. implied is the key of a
// first value that has none; "" allows none.
func ParseOptions(text, implied string) (*Options, error) {
	if len(text) > maxOptionText {
		return nil, fmt.Errorf("Options of %d bytes are too long: at most %d are allowed", len(text), maxOptionText)
	}
	o := new(Options)
	if strings.HasPrefix(text, "{") {
		if err := o.parseJSON(text); err != nil {
			return nil, fmt.Errorf("Could not parse the JSON options: %w", err)
		}
		return o, nil
	}
	return o, o.parseKeyval(text, implied)
}

func (o *Options) parseKeyval(text, implied string) error {
	for text != "" {
		end := strings.IndexAny(text, "=,")
		if end < 0 {
			end = len(text)
		}
		key, value := text[:end], ""
		switch {
		case key != "" && implied != "" && !strings.HasPrefix(text[end:], "="):
			key, value = implied, key
			text = strings.TrimPrefix(text[end:], ",")
		case key == "":
			return fmt.Errorf("Invalid parameter '%s'", key)
		case !strings.HasPrefix(text[end:], "="):
			return fmt.Errorf("Expected '=' after parameter '%s'", key)
		default:
			value, text = cutValue(text[end+1:])
		}
		implied = ""
		if err := o.Set(key, value); err != nil {
			return err
		}
	}
	return nil
}

// cutValue splits text behind the first value; two commas stand for one in it.
func cutValue(text string) (value, rest string) {
	var b strings.Builder
	for {
		part, after, found := strings.Cut(text, ",")
		b.WriteString(part)
		if !found || !strings.HasPrefix(after, ",") {
			return b.String(), after
		}
		b.WriteByte(',')
		text = after[1:]
	}
}

var errNoObject = errors.New("Invalid JSON object given")

// parseJSON reads an object into o.
func (o *Options) parseJSON(text string) error {
	if !utf8.ValidString(text) {
		return errors.New("invalid UTF-8") // the decoder would replace it
	}
	d := json.NewDecoder(strings.NewReader(text))
	d.UseNumber()
	t, err := d.Token()
	if err != nil {
		return jsonError(err)
	}
	if t != json.Delim('{') {
		return errNoObject
	}
	if err := o.readObject(d, "", 0); err != nil {
		return jsonError(err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("there is more text behind the object")
	}
	return nil
}

func jsonError(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// readObject reads an object behind its brace; name is its own.
func (o *Options) readObject(d *json.Decoder, name string, depth int) error {
	o.sub = make(map[string]*Options)
	for d.More() {
		t, err := d.Token()
		if err != nil {
			return err
		}
		key, ok := t.(string)
		if !ok {
			return fmt.Errorf("'%s' has a key that is no text", name)
		}
		sub, deeper, err := o.at(key, depth)
		if err != nil {
			return err
		}
		if err := sub.readValue(d, join(name, key), deeper); err != nil {
			return err
		}
	}
	_, err := d.Token()
	return err
}

func (o *Options) readValue(d *json.Decoder, name string, depth int) error {
	if o.given || o.sub != nil {
		return fmt.Errorf("Parameter '%s' is given twice", name)
	}
	t, err := d.Token()
	if err != nil {
		return err
	}
	switch t {
	case json.Delim('{'):
		return o.readObject(d, name, depth)
	case json.Delim('['):
		o.sub = make(map[string]*Options)
		for i := 0; d.More(); i++ {
			sub, deeper, err := o.at(strconv.Itoa(i), depth)
			if err != nil {
				return err
			}
			if err := sub.readValue(d, join(name, strconv.Itoa(i)), deeper); err != nil {
				return err
			}
		}
		_, err := d.Token()
		return err
	}
	o.given, o.value = true, t
	return nil
}

func join(name, key string) string {
	if name == "" {
		return key
	}
	return name + "." + key
}

// at finds or makes the place of the option called name, which is depth levels down,
// and tells how deep that is.
func (o *Options) at(name string, depth int) (*Options, int, error) {
	for part := range strings.SplitSeq(name, ".") {
		depth++
		switch {
		case part == "":
			return nil, 0, fmt.Errorf("Invalid parameter '%s'", name)
		case len(part) > maxOptionName:
			return nil, 0, fmt.Errorf("Parameter '%.*s...' is too long", maxOptionName, part)
		case depth > maxOptionDepth:
			return nil, 0, fmt.Errorf("Parameter '%.*s' is nested too deep: at most %d levels are allowed", maxOptionName, name, maxOptionDepth)
		}
		sub := o.sub[part]
		if sub == nil {
			if o.sub == nil {
				o.sub = make(map[string]*Options)
			}
			sub = new(Options)
			o.sub[part] = sub
		}
		o = sub
	}
	return o, depth, nil
}

// Set gives option name a value: a string, bool, int64, []string, or nil for the null of JSON.
func (o *Options) Set(name string, value any) error {
	if list, ok := value.([]string); ok {
		for i, v := range list {
			if err := o.Set(join(name, strconv.Itoa(i)), v); err != nil {
				return err
			}
		}
		return nil
	}
	leaf, _, err := o.at(name, 0)
	if err != nil {
		return err
	}
	if leaf.given {
		return fmt.Errorf("Parameter '%s' is given twice", name)
	}
	if n, ok := value.(int64); ok {
		value = json.Number(strconv.FormatInt(n, 10))
	}
	leaf.given, leaf.value = true, value
	return nil
}

// find returns the place of option name, or nil.
func (o *Options) find(name string) *Options {
	for part := range strings.SplitSeq(name, ".") {
		if o = o.sub[part]; o == nil {
			return nil
		}
	}
	return o
}

// take is find, and takes the option out of o.
func (o *Options) take(name string) *Options {
	part, rest, nested := strings.Cut(name, ".")
	sub := o.sub[part]
	if sub == nil {
		return nil
	}
	found := sub
	if nested {
		found = sub.take(rest)
	}
	if !nested || found != nil && !sub.given && len(sub.sub) == 0 {
		delete(o.sub, part)
	}
	return found
}

// clone is a deep copy, without what is nil.
func (o *Options) clone() *Options {
	c := new(Options)
	if o != nil {
		c.given, c.value = o.given, o.value
		if o.sub != nil {
			c.sub = make(map[string]*Options, len(o.sub))
			for k, v := range o.sub {
				c.sub[k] = v.clone()
			}
		}
	}
	return c
}

// merge adds what of other is not given in o.
func (o *Options) merge(other *Options) {
	if !o.given {
		o.given, o.value = other.given, other.value
	}
	for key, sub := range other.sub {
		if o.sub == nil {
			o.sub = make(map[string]*Options)
		}
		if mine := o.sub[key]; mine != nil {
			mine.merge(sub)
		} else {
			o.sub[key] = sub
		}
	}
}

// names lists the direct parts of names, numbers in their order.
func (o *Options) names() []string {
	return slices.SortedFunc(maps.Keys(o.sub), func(a, b string) int {
		i, ierr := strconv.Atoi(a)
		j, jerr := strconv.Atoi(b)
		if ierr == nil && jerr == nil && i != j {
			return i - j
		}
		return strings.Compare(a, b)
	})
}

// first is the full name of some option that is there, the same each time; "" if o is empty.
func (o *Options) first() string {
	names := o.names()
	if len(names) == 0 {
		return ""
	}
	sub := o.sub[names[0]]
	if below := sub.first(); !sub.given && below != "" {
		return join(names[0], below)
	}
	return names[0]
}

// list reads a list of texts.
func (o *Options) list() ([]string, bool) {
	if o.given {
		return nil, false
	}
	list := make([]string, 0, len(o.sub))
	for i := range len(o.sub) {
		sub := o.sub[strconv.Itoa(i)]
		if sub == nil || sub.sub != nil {
			return nil, false
		}
		s, ok := sub.value.(string)
		if !ok {
			return nil, false
		}
		list = append(list, s)
	}
	return list, true
}

// plain gives the options as a map, a list or a single value.
func (o *Options) plain() any {
	if o.given {
		return o.value
	}
	list := make([]any, 0, len(o.sub))
	for i := range len(o.sub) {
		if sub := o.sub[strconv.Itoa(i)]; sub != nil {
			list = append(list, sub.plain())
		}
	}
	if len(list) > 0 && len(list) == len(o.sub) {
		return list
	}
	return o.object()
}

func (o *Options) object() map[string]any {
	m := make(map[string]any, len(o.sub))
	for name, sub := range o.sub {
		m[name] = sub.plain()
	}
	return m
}

// MarshalJSON implements [json.Marshaler]: an object with nested objects and lists,
// its keys in order.
func (o *Options) MarshalJSON() ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	err := e.Encode(o.object())
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), err
}

const sizeSuffixes = "KMGTPE"

// ParseSize reads a size in bytes: digits and at most one of the suffixes k, M, G, T,
// P and E (powers of 1024, either case).
func ParseSize(s string) (int64, error) {
	digits := strings.TrimRight(s, sizeSuffixes+strings.ToLower(sizeSuffixes))
	suffix := s[len(digits):]
	shift := 0
	if len(suffix) == 1 {
		shift = 10 * (1 + strings.Index(sizeSuffixes, strings.ToUpper(suffix)))
	}
	if digits == "" || shift == 0 && suffix != "" || strings.Trim(digits, "0123456789") != "" {
		return 0, fmt.Errorf("'%s' is not a size: digits are expected, then nothing or one of k, M, G, T, P, E (powers of 1024)", s)
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n > math.MaxInt64>>shift {
		return 0, fmt.Errorf("size '%s' is too large: the maximum is 8E - 1", s)
	}
	return n << shift, nil
}
